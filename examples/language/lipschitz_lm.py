"""Trains a causal character model whose Lipschitz constant is certified, and records its accuracy.

    python examples/language/lipschitz_lm.py --lipschitz=2 --seed=0
    python examples/language/lipschitz_lm.py --lipschitz=2 --attention=none --seed=0

The text is tiny Shakespeare, `tinyshakespeare.txt` in the folder that `LIPATTN_DATA` names; the
last tenth is for validation. The constant is that of the map from the embeddings to the logits,
where a sequence is as long as its largest token and a token is measured by the root of the mean
square of its entries (RMS). Embeddings have an RMS of at most 1. `--lipschitz=0` trains the same
model without any cap.

Each head of the first layer starts at one distance to the left: together they hand the last
characters to a perceptron with orthogonal kernels, side by side. Changing all of these characters
moves that vector by `sqrt(heads)` of the change of one, where an average would lose a factor of
`heads`. Attention looks at positions alone: the scores of contents cost more of the constant than
they give. `--attention=full` learns them too, and `--attention=none` leaves attention out, so that
only the current character is seen. `--attention=blocks` is the usual architecture, that of Newhouse
et al. ("Training Transformers with enforced Lipschitz constants", 2025) with a constant that is
proven: three blocks of attention by contents and positions and a perceptron of four times the width
with a scaled GELU, each in a convex residual connection of weight 1/6, Lipschitz by orthogonal
kernels and a cap on attention.

Reported are the accuracy on the whole validation text in disjoint windows (`honest`), that on the
first 20 batches of 512 windows which start at every character (`first windows`), and certified
accuracies: the share of characters predicted correctly however all embeddings of the context
change, each by an RMS of at most the radius. An attack by gradients then tries to change the
predictions of some windows within their radii, and at three times their radii. A run adds a line to
--record, and `--table` prints a table of it. An interrupted run continues where it stopped.
"""

import collections
import json
import math
import os
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from keras import ops

import keras_lipattn
from keras_lipattn import (
    BoundedMultiHeadAttention,
    MaxMin,
    OrthogonalDense,
    Residual,
    TokenProjection,
)

_KINDS = ("positions", "full", "none", "blocks")
_LIPSCHITZ = flags.DEFINE_float("lipschitz", 2.0, "constant to keep; 0 for none", lower_bound=0.0)
_ATTENTION = flags.DEFINE_enum("attention", "positions", _KINDS, "what attention looks at")
_SEED = flags.DEFINE_integer("seed", 0, "seed of weights and windows")
_WIDTH = flags.DEFINE_integer("width", 128, "size of an embedding", lower_bound=2)
_CONTEXT = flags.DEFINE_integer("context", 128, "characters of a window", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 32, "windows of a step", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 8, "attention heads", lower_bound=1)
_UNITS = flags.DEFINE_integer("units", 512, "units of each layer of the perceptron", lower_bound=2)
_LAYERS = flags.DEFINE_integer("layers", 3, "layers of the perceptron", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1500, "training steps", lower_bound=20)
_RATE = flags.DEFINE_float("learning_rate", 0.01, "largest learning rate", lower_bound=0.0)
_THREADS = flags.DEFINE_integer("threads", 1, "threads of TensorFlow", lower_bound=1)
_ATTACKED = flags.DEFINE_integer("attacked", 64, "windows to attack", lower_bound=0)
_RECORD = flags.DEFINE_string("record", "build/results/lipschitz_lm.jsonl", "file of the results")
_TABLE = flags.DEFINE_bool("table", False, "print the table of the record and train nothing")

_HEAD_SIZE = 64
_BLOCKS = 3
# Largest slope of GELU.
_GELU = 1.128905
_EPOCHS = 10
_RADII = (0.01, 0.03, 0.1, 0.3)
_ATTACK_STEPS, _RESTARTS = 25, 3


def load() -> tuple[str, np.ndarray, np.ndarray]:
    """The symbols, and the numbers of the characters of both parts of the text."""
    folder = os.environ.get("LIPATTN_DATA")
    path = pathlib.Path(folder or "") / "tinyshakespeare.txt"
    if folder is None or not path.is_file():
        raise SystemExit(
            "The text is read from tinyshakespeare.txt in the folder that LIPATTN_DATA names. "
            f"Received: LIPATTN_DATA={folder!r}" + (" without that file" if folder else "")
        )
    text = path.read_text("utf-8")
    symbols = "".join(sorted(set(text)))
    numbers = np.array([symbols.index(symbol) for symbol in text], np.int32)
    kept = int(0.9 * len(numbers))
    return symbols, numbers[:kept], numbers[kept:]


@keras.saving.register_keras_serializable(package="examples")
class OneDistance(keras.initializers.Initializer):
    """Relative biases by which head `h` looks at the token `h` places before its own."""

    def __call__(self, shape, dtype=None):
        heads, reach = shape[0], shape[1] // 2
        table = np.zeros(shape)
        table[0] = -6.0
        for head in range(1, heads):
            table[head, reach + head - 1] = 6.0
        return ops.convert_to_tensor(table, dtype)


def build(symbols: int, capped: bool, scale: float) -> keras.Model:
    """The map from embeddings `(batch, context, width)` to logits, of constant at most `scale`."""
    dense = OrthogonalDense if capped else keras.layers.Dense
    cap = {"lipschitz_bound": 1.0, "lipschitz_norm": "token"} if capped else {}
    embeddings = keras.Input((_CONTEXT.value, _WIDTH.value), name="embeddings")
    middle = blocks if _ATTENTION.value == "blocks" else last_characters
    x = dense(symbols, name="logits")(middle(embeddings, dense, cap))
    return keras.Model(embeddings, keras.layers.Rescaling(scale, name="scale")(x), name="certified")


def last_characters(x, dense, cap):
    """A perceptron on the last tokens, which one layer of attention puts side by side."""
    if _ATTENTION.value != "none":
        attention = BoundedMultiHeadAttention(
            _HEADS.value,
            key_dim=16,
            value_dim=_HEAD_SIZE,
            token_radius=math.sqrt(_WIDTH.value),
            output_shape=_HEADS.value * _HEAD_SIZE,
            max_relative_position=2 * _HEADS.value,
            kernel_initializer="orthogonal",
            name="attention",
            **cap,
        )
        x = attention(x, use_causal_mask=True)
        start(attention)
    for layer in range(1, _LAYERS.value + 1):
        x = MaxMin(name=f"sort{layer}")(dense(_UNITS.value, name=f"dense{layer}")(x))
    return x


def blocks(x, dense, cap):
    """Blocks of attention and a perceptron, each in a convex residual connection."""
    alpha, width = 1.0 / (2 * _BLOCKS), _WIDTH.value
    for block in range(1, _BLOCKS + 1):
        attention = BoundedMultiHeadAttention(
            _HEADS.value,
            key_dim=width // _HEADS.value,
            token_radius=math.sqrt(width),
            max_relative_position=16,
            kernel_initializer="orthogonal",
            name=f"attention{block}",
            **cap,
        )
        x = Residual(alpha)([x, attention(x, use_causal_mask=True)])
        y = keras.layers.Activation("gelu")(dense(4 * width, name=f"up{block}")(x))
        y = dense(width, name=f"down{block}")(keras.layers.Rescaling(1.0 / _GELU)(y))
        x = Residual(alpha)([x, y])
    return x


def start(attention: BoundedMultiHeadAttention) -> None:
    """Lets each head look at one distance and copy it, with next to no scores of contents."""
    assert attention.relative_bias is not None
    attention.relative_bias.assign(OneDistance()(attention.relative_bias.shape, "float32"))
    attention.output_kernel.assign(
        np.reshape(np.eye(_HEADS.value * _HEAD_SIZE), attention.output_kernel.shape)
    )
    attention.query_kernel.assign(0.002 * attention.query_kernel)
    # Above its cap from the start, so that only the proportions of the heads matter.
    attention.value_kernel.assign(2.0 * attention.value_kernel)
    if _ATTENTION.value == "positions":
        attention.query_kernel.assign(0.0 * attention.query_kernel)
        attention.query_kernel.trainable = False


def language_model(symbols: int, certified: keras.Model) -> keras.Model:
    """Characters to logits: embeddings of an RMS of at most 1, then the certified map."""
    characters = keras.Input((_CONTEXT.value,), dtype="int32", name="characters")
    embedding = keras.layers.Embedding(
        symbols, _WIDTH.value, embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0)
    )
    x = TokenProjection(math.sqrt(_WIDTH.value), name="ball")(embedding(characters))
    return keras.Model(characters, certified(x), name="language_model")


def training_set(text: np.ndarray) -> tf.data.Dataset:
    """Random windows, the same in every run of a seed."""
    length = _CONTEXT.value + 1
    starts = tf.data.Dataset.random(seed=_SEED.value, rerandomize_each_iteration=True)
    starts = starts.batch(_BATCH.value, drop_remainder=True)
    characters = tf.constant(text)

    def windows(numbers):
        first = tf.cast(numbers % (len(text) - length), tf.int32)
        window = tf.gather(characters, first[:, None] + tf.range(length))
        return window[:, :-1], window[:, 1:]

    return starts.map(windows).prefetch(2)


def train(model: keras.Model, text: np.ndarray, folder: pathlib.Path) -> None:
    steps = _STEPS.value
    schedule = keras.optimizers.schedules.CosineDecay(
        0.01 * _RATE.value,
        decay_steps=steps - steps // 20,
        warmup_target=_RATE.value,
        warmup_steps=steps // 20,
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        training_set(text),
        epochs=_EPOCHS,
        steps_per_epoch=steps // _EPOCHS,
        shuffle=False,
        callbacks=[keras_lipattn.DurableBackup(folder)],
        verbose=2,
    )


def evaluate(model: keras.Model, certified: keras.Model, text: np.ndarray) -> dict:
    """Accuracies on the validation text and the certified ones, with the constants."""
    length = _CONTEXT.value
    windows = (len(text) - 1) // length
    characters, following = (
        text[first : first + windows * length].reshape(windows, length) for first in (0, 1)
    )
    logits = model.predict(characters, batch_size=64, verbose=0)
    correct = logits.argmax(axis=-1) == following
    nats = keras.losses.sparse_categorical_crossentropy(following, logits, from_logits=True)
    first = np.lib.stride_tricks.sliding_window_view(text, length + 1)[: 20 * 512]
    _, accuracy = model.evaluate(first[:, :-1], first[:, 1:], batch_size=64, verbose=0)
    certificate = keras_lipattn.certify(certified, norm="token")
    # The radius of an embedding is in RMS, that of the certificate in the 2-norm of a token.
    radius = certificate.certified_radius(logits) / math.sqrt(_WIDTH.value)
    embeddings = model.get_layer("ball")(model.layers[1](characters[:2]))
    found = keras_lipattn.estimate_lipschitz(
        certified, ops.convert_to_numpy(embeddings), "token", steps=20, restarts=2
    )
    windows = min(_ATTACKED.value, len(characters))
    embeddings = model.get_layer("ball")(model.layers[1](characters[:windows]))
    attacked = attack(certified, embeddings, logits[:windows], radius[:windows]) if windows else {}
    to_rms = math.sqrt(_WIDTH.value / logits.shape[-1])
    return {
        "honest": float(correct.mean()),
        "nats": float(np.mean(nats)),
        "first windows": float(accuracy),
        "constant": certificate.total * to_rms,
        "found": found.value * to_rms,
        "certified": {f"{each:g}": float((correct & (radius > each)).mean()) for each in _RADII},
        "median radius": float(np.median(radius)),
        "attack": attacked,
    }


def attack(certified: keras.Model, embeddings, logits: np.ndarray, radius: np.ndarray) -> dict:
    """Predictions that an attack changes, of three characters of every window.

    Args:
        certified: The map from embeddings to logits.
        embeddings: Shape `(windows, context, width)`.
        logits: What the map makes of them.
        radius: Certified radii in RMS, shape `(windows, context)`.

    Returns:
        Dictionary with the number of `predictions` that were attacked, `changed inside` and
        `changed at 3 times` their radii.
    """
    symbols = logits.shape[-1]

    def gradient(change, place, best):
        with tf.GradientTape() as tape:
            tape.watch(change)
            found = certified(embeddings + change)[:, place]
            own = tf.gather(found, best, batch_dims=1)
            others = tf.reduce_max(found - 1e9 * tf.one_hot(best, symbols), axis=-1)
            gain = tf.reduce_sum(others - own)
        return tape.gradient(gain, change)

    gradient = tf.function(gradient, autograph=False)
    places = [_CONTEXT.value // 8, _CONTEXT.value // 2, _CONTEXT.value - 1]
    changed = dict.fromkeys((0.999, 3.0), 0)
    for place in places:
        best = tf.constant(logits[:, place].argmax(axis=-1))
        for share in changed:
            size = share * radius[:, place, None, None] * math.sqrt(_WIDTH.value)

            def onto_spheres(x, size=size):
                norms = tf.maximum(tf.norm(x, axis=-1, keepdims=True), 1e-12)
                return tf.cast(size, x.dtype) * x / norms

            fooled = np.zeros(len(logits), bool)
            for restart in range(_RESTARTS):
                start = np.random.default_rng(restart).normal(size=embeddings.shape)
                change = onto_spheres(tf.constant(start, "float32"))
                for _ in range(_ATTACK_STEPS):
                    slope = gradient(change, tf.constant(place), best)
                    change = onto_spheres(change + 0.5 * onto_spheres(slope))
                found = certified(embeddings + change)[:, place]
                fooled |= ops.convert_to_numpy(found).argmax(axis=-1) != best.numpy()
            changed[share] += int(fooled.sum())
    return {
        "predictions": len(places) * len(logits),
        "changed inside": changed[0.999],
        "changed at 3 times": changed[3.0],
    }


def table(record: pathlib.Path) -> str:
    """Mean over the seeds of each setting, and half of the range."""
    runs = collections.defaultdict(list)
    for line in record.read_text().splitlines():
        run = json.loads(line)
        runs[run["attention"], run["lipschitz"], run["width"]].append(run)
    heads = [
        "attention",
        "constant kept",
        "width",
        "certified",
        "found",
        "seeds",
        "honest",
        "first windows",
    ]
    heads += [f"certified at {radius:g}" for radius in _RADII] + ["minutes"]
    lines = [f"| {' | '.join(heads)} |", len(heads) * "| --- " + "|"]
    for (attention, lipschitz, width), found in sorted(runs.items()):
        shares = [[run[name] for run in found] for name in ("honest", "first windows")]
        shares += [[run["certified"][f"{radius:g}"] for run in found] for radius in _RADII]
        cells = [attention, f"{lipschitz:g}" if lipschitz else "none", str(width)]
        cells += [f"{max(run[name] for run in found):.4g}" for name in ("constant", "found")]
        cells.append(str(len(found)))
        cells += [
            f"{100 * np.mean(each):.1f}" + (len(each) > 1) * f" ± {50 * np.ptp(each):.1f}"
            for each in shares
        ]
        cells.append(f"{np.mean([run['processor seconds'] for run in found]) / 60:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    record = pathlib.Path(_RECORD.value)
    if _TABLE.value:
        print(table(record))
        return
    tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
    tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
    started, processor = time.monotonic(), time.process_time()
    symbols, training, validation = load()
    keras.utils.set_random_seed(_SEED.value)
    capped = _LIPSCHITZ.value > 0.0
    scale = _LIPSCHITZ.value * math.sqrt(len(symbols) / _WIDTH.value) if capped else 1.0
    certified = build(len(symbols), capped, scale)
    model = language_model(len(symbols), certified)
    settings = (_LIPSCHITZ, _ATTENTION, _SEED, _STEPS, _WIDTH, _CONTEXT, _BATCH)
    settings += (_HEADS, _UNITS, _LAYERS, _RATE)
    results = {each.name: each.value for each in settings}
    train(model, training, record.parent / "backups" / "-".join(map(str, results.values())))
    results |= {"weights": model.count_params()} | evaluate(model, certified, validation)
    results |= {
        "seconds": round(time.monotonic() - started),
        "processor seconds": round(time.process_time() - processor),
        "threads": _THREADS.value,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a") as file:
        file.write(json.dumps(results) + os.linesep)
    print(results)


if __name__ == "__main__":
    app.run(main)
