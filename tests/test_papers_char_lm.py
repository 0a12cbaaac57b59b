"""The character-level language models: no leak, equal size, cached text, what is kept."""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import json
import math
import pathlib
import zipfile

import char_lm
import char_model
import char_training
import corpora
import keras
import numpy as np
import pytest

KEPT = pathlib.Path(__file__).parents[1] / "docs" / "papers" / "char_lm.json"
SIZE = char_model.Size(layers=2, width=12, heads=2, context=8)
TIED = char_model.TIED


def model_of(variant, size=SIZE, symbols=7):
    """A model whose kernels are large enough for attention to be far from uniform."""
    keras.utils.set_random_seed(0)
    model = char_model.build(variant, size, symbols)
    for weight in model.trainable_variables:
        if len(weight.shape) > 1:
            weight.assign(2.0 * weight)
    return model


def texts(*shape, symbols=7, seed=0):
    return np.random.default_rng(seed).integers(0, symbols, shape).astype("int32")


@pytest.mark.parametrize("variant", char_model.VARIANTS)
def test_no_character_sees_a_later_one(variant):
    model = model_of(variant)
    text = texts(4, SIZE.context)
    whole = np.asarray(model(text))
    for position in range(1, SIZE.context):
        other = text.copy()
        other[:, position:] = (other[:, position:] + 1 + texts(4, 1, symbols=6)) % 7
        again = np.asarray(model(other))
        # The same sums of the same numbers: later ones enter multiplied with zero.
        np.testing.assert_allclose(again[:, :position], whole[:, :position], rtol=0, atol=1e-6)
        assert np.abs(again[:, position] - whole[:, position]).max() > 1e-3


@pytest.mark.parametrize("variant", char_model.VARIANTS)
def test_earlier_characters_are_heard(variant):
    model = model_of(variant)
    text = texts(4, SIZE.context)
    other = text.copy()
    other[:, 0] = (other[:, 0] + 1) % 7
    moved = np.abs(np.asarray(model(other)) - np.asarray(model(text)))[:, -1].max()
    # Contractive branches are scaled down, and heads of bounded tokens start with near tokens.
    assert moved > (1e-6 if "contractive" in variant or variant in char_model.BOUNDED else 1e-3)


def test_variants_have_the_same_number_of_weights():
    for setting in (char_lm.SMALL, char_lm.FULL):
        counts = [
            char_model.trainable_weights(char_model.build(variant, setting.size, 50))
            for variant in char_model.VARIANTS
        ]
        assert max(counts) <= 1.01 * min(counts)


@pytest.mark.parametrize("variant", TIED)
def test_cached_text_is_that_of_the_full_pass(variant):
    model = model_of(variant)
    prompt = texts(3, 2)
    text, logits = char_model.generate(model, prompt, SIZE.context, temperature=0.0)
    np.testing.assert_array_equal(text[:, :2], prompt)
    full = np.asarray(model(text))[:, :-1]
    # float32 sums in another order; the scale of a branch is computed twice, alike to 1e-6.
    np.testing.assert_allclose(logits, full, rtol=0, atol=1e-5 * max(1.0, np.abs(full).max()))
    np.testing.assert_array_equal(text[:, 2:], full[:, 1:].argmax(axis=-1))


def test_drawn_texts_depend_on_the_seed_alone():
    model = model_of("l2")
    draw = [char_model.generate(model, texts(3, 2), 8, seed=seed)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_what_cannot_be_generated_is_refused():
    with pytest.raises(ValueError, match=r"at most 8 characters. Received: length=9"):
        char_model.generate(model_of("l2"), texts(1, 2), 9)
    with pytest.raises(ValueError, match=r"Received: \['MultiHeadAttention'\]"):
        char_model.generate(model_of("dot_product"), texts(1, 2), 8)


def test_only_tied_attention_is_certified_and_the_published_bound_scales_further_down():
    found = {v: char_training.certificates(model_of(v)) for v in char_model.VARIANTS}
    assert found["dot_product"]["log10"] is None
    assert "not Lipschitz" in found["dot_product"]["reason"]
    assert found["dot_product, relative"]["log10"] is None
    assert "no Lipschitz constant" in found["dot_product, relative"]["reason"]
    assert found["l2_untied"]["log10"] is None
    assert "no constant exists" in found["l2_untied"]["reason"]
    for variant in TIED:
        assert found[variant]["log10"] is not None
        for layer in found[variant]["attention"]:
            assert (layer["published"] is None) == ("relative" in variant)
            assert layer["ours"] <= (layer["published"] or {"l2": math.inf})["l2"]
    published, ours = (found[variant]["attention"] for variant in TIED[-2:])
    for one, other in zip(published, ours, strict=True):
        assert one["contraction"] < other["contraction"] <= char_model.COEFFICIENT
        # What the float32 bound in the graph scales by is no more than the published bound allows.
        assert one["scale"] * one["published"]["l2"] <= char_model.COEFFICIENT * (1 + 1e-6)
        assert one["scale"] * one["published"]["l2"] >= 0.98 * char_model.COEFFICIENT


def test_contractive_attention_is_inverted():
    model = model_of(TIED[-1])
    x = np.random.default_rng(0).normal(size=(2, 8, 12)).astype("float32")
    for index in range(SIZE.layers):
        block = model.get_layer(f"attention_{index}")
        np.testing.assert_allclose(block.inverse(block(x)).solution, x, atol=1e-5)


def test_losses_are_those_of_the_characters_that_follow():
    model = model_of("l2")
    text = texts(30)
    logits = np.asarray(model(np.stack([text[:8], text[8:16], text[16:24]])))
    logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    following = np.stack([text[1:9], text[9:17], text[17:25]])
    expected = -np.take_along_axis(logits, following[..., None], axis=-1).mean()
    found = char_training.nats_per_character(model, text, batch=2)
    # float32 sums of a few dozen terms.
    assert found == pytest.approx(expected, rel=1e-5)


def test_training_depends_on_the_seed_alone_and_learns():
    text = np.tile(np.arange(7, dtype="int32"), 60)
    corpus = corpora.Corpus("count", "abcdefg", text, text[:40], text[:40])
    plan = char_training.Plan(batch=4, steps=30, warm_up=5)
    runs = [char_training.train("l2", SIZE, corpus, plan, 0.02, seed=3) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    # What follows is certain; without learning it is log(7) = 1.95 nats.
    assert char_training.nats_per_character(runs[0][0], corpus.test) < 0.5


def test_warm_up_rises_to_the_rate_and_falls_like_the_root():
    schedule = char_training.WarmUp(0.1, 4)
    rates = [float(schedule(step)) for step in (0, 1, 3, 15)]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.1, 0.05], rtol=1e-6)
    again = char_training.WarmUp.from_config(schedule.get_config())
    assert float(again(7)) == float(schedule(7))


def test_treebank_is_read_in_the_stated_convention(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "ptb.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"ptb.{part}.txt", " no it was n't \n <unk> N \n")
    monkeypatch.setenv("LIPATTN_DATA", str(tmp_path))
    corpus = corpora.load("ptb")
    assert corpus.text(corpus.train) == "no_it_was_n't\n<unk>_N\n"
    np.testing.assert_array_equal(corpus.train, corpus.test)


def test_the_documentation_is_always_there(monkeypatch):
    monkeypatch.delenv("LIPATTN_DATA", raising=False)
    corpus = corpora.load("pydoc")
    assert len(corpus.train) > 300_000
    assert corpus.text(corpus.train[:400]).isprintable() is False
    for name in ("ptb", "shakespeare"):
        with pytest.raises(FileNotFoundError, match=r"LIPATTN_DATA names.*Received: .*=None"):
            corpora.load(name)
    with pytest.raises(ValueError, match="Received: 'klingon'"):
        corpora.load("klingon")


def test_frequencies_are_those_of_the_training_text():
    train = np.array([0, 1, 0, 1, 0, 1, 0], "int32")
    corpus = corpora.Corpus("two", "ab", train, train, np.array([1, 0, 1], "int32"))
    # One more than counted: of those after the first, 4 b and 4 a; after b 4 a and 1 b.
    assert corpora.frequency_nats(corpus, 0) == pytest.approx(np.log(2.0))
    assert corpora.frequency_nats(corpus, 1) == pytest.approx(-np.log(0.8))


def test_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LIPATTN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tinyshakespeare\.txt .*without that file"):
        corpora.load("shakespeare")


def test_kept_runs_are_not_run_again_unless_settings_change(tmp_path):
    path = tmp_path / "runs"
    kept = char_training.Kept(path, [1])
    assert kept.run("a", lambda: {"value": 1})["value"] == 1
    again = char_training.Kept(path, [1])
    assert again.run("a", lambda: {"value": 2})["value"] == 1
    assert char_training.Kept(path, [2]).run("a", lambda: {"value": 3})["value"] == 3


def test_an_interruption_loses_one_run(tmp_path):
    kept = char_training.Kept(tmp_path / "runs", [])
    kept.run("a", dict)
    with pytest.raises(KeyboardInterrupt):
        kept.run("b", _interrupt)
    assert set(json.loads((tmp_path / "runs").read_text())["runs"]) == {"a"}


def _untrained(variant, size, corpus, plan, rate, seed):
    keras.utils.set_random_seed(seed)
    return char_model.build(variant, size, len(corpus.symbols)), [3.0, 2.5]


def _interrupt():
    raise KeyboardInterrupt


def test_the_rate_chosen_is_the_best_of_its_variant():
    tuning = [
        {"variant": "l2", "rate": 0.1, "valid_nats": None},
        {"variant": "l2", "rate": 0.2, "valid_nats": 2.0},
        {"variant": "l2", "rate": 0.3, "valid_nats": 1.5},
        {"variant": "dot_product", "rate": 0.4, "valid_nats": 1.0},
    ]
    assert char_lm.chosen_rate(tuning, "l2", char_lm.FULL) == 0.3
    assert char_lm.chosen_rate([], "l2", char_lm.FULL) == char_lm.FULL.rates[0]


def test_the_program_runs_on_the_documentation(tmp_path, monkeypatch):
    tiny = char_lm.Setting(
        size=SIZE._replace(layers=1),
        plan=char_training.Plan(batch=4, steps=4, warm_up=2),
        rates=(0.01,),
        tuning_steps=0,
        seeds=1,
        deep_size=SIZE,
        deep_plan=char_training.Plan(batch=4, steps=4, warm_up=0),
        deep_rates=(0.01,),
        depths=(1,),
    )
    monkeypatch.setattr(char_lm, "SMALL", tiny)
    monkeypatch.setattr(char_lm, "PROMPT", 2)
    # Training is tested above; here it would take most of the time.
    monkeypatch.setattr(char_lm, "train", _untrained)
    read = corpora.load("pydoc")
    parts = {"train": read.train[:2000], "valid": read.valid[:300], "test": read.test[:300]}
    monkeypatch.setattr(corpora, "load", lambda name: read._replace(**parts))
    char_lm.main(["--folder", str(tmp_path)])
    results = json.loads((tmp_path / "char_lm.json").read_text())
    assert [run["variant"] for run in results["runs"]] == list(char_model.VARIANTS)
    for run in results["runs"]:
        assert run["test_nats"] > 0.0
        assert run.get("decoding_error", 0.0) <= 1e-5 * 10
    assert not (tmp_path / "char_lm.runs").exists()
    assert (tmp_path / "char_lm.png").stat().st_size > 10_000


def test_kept_models_are_compared_fairly_and_ours_is_the_better_bound():
    results = json.loads(KEPT.read_text())
    runs = {(run["variant"], run["seed"]): run for run in results["runs"]}
    seeds = range(results["setting"]["seeds"])
    assert len(seeds) >= 3
    assert set(runs) == {(variant, seed) for variant in char_model.VARIANTS for seed in seeds}
    weights = [run["parameters"] for run in runs.values()]
    assert max(weights) <= 1.01 * min(weights)
    for variant in char_model.VARIANTS:
        tuned = [row for row in results["tuning"] if row["variant"] == variant]
        assert {row["rate"] for row in tuned} == set(results["setting"]["rates"])
        best = min(tuned, key=lambda row: row["valid_nats"])["rate"]
        assert {runs[variant, seed]["rate"] for seed in seeds} == {best}
        for seed in seeds:
            certified = runs[variant, seed]["certificates"]["log10"]
            assert (certified is not None) == (variant in (*TIED, *char_model.BOUNDED))
    for seed in seeds:
        published, ours = (runs[variant, seed]["test_nats"] for variant in TIED[-2:])
        assert ours < published
        # The contraction costs at most 3 % where tokens are bounded.
        contractive = runs["contractive, bounded tokens", seed]
        assert contractive["test_nats"] <= 1.03 * runs["bounded tokens", seed]["test_nats"]
        for variant in TIED[-2:] + char_model.BOUNDED[1:]:
            for layer in runs[variant, seed]["certificates"]["attention"]:
                assert layer["contraction"] <= char_model.COEFFICIENT
        # With relative positions L2 attention is within 2 % of dot-product attention.
        dot, tied = (runs[f"{kind}, relative", seed]["test_nats"] for kind in ("dot_product", "l2"))
        assert tied <= 1.02 * dot
        # float32 logits of a size of about ten, through layers that amplify small terms.
        assert all(runs[variant, seed]["decoding_error"] <= 2e-4 for variant in TIED)
