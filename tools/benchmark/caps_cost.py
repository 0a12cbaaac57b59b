"""What `spectral_norm` and `lipschitz_bound` cost in training and at inference."""

import time

import keras
import numpy as np

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import Spread, alternate
from tools.benchmark._steps import forward, tokens, training_step

CLAIM = (
    "spectral_norm=1 with lipschitz_bound=1 costs little in training and nothing once condensed "
    "(times the layer with caps takes over the layer without)"
)
SHAPE = (8, 128, 256, 8)
# Attention layers of the model that XLA compiles, and its input: batch, tokens, features, heads.
JIT_DEPTH, JIT_SHAPE = 4, (8, 64, 128, 4)


def measure():
    batch, length, features, heads = SHAPE
    x = tokens(batch, length, features)
    layers = {
        "none": L2MultiHeadAttention(heads, features // heads),
        "both": L2MultiHeadAttention(
            heads, features // heads, spectral_norm=1.0, lipschitz_bound=1.0
        ),
        "spectral_norm": L2MultiHeadAttention(heads, features // heads, spectral_norm=1.0),
        "lipschitz_bound": L2MultiHeadAttention(heads, features // heads, lipschitz_bound=1.0),
    }
    steps = {name: training_step(layer, x) for name, layer in layers.items()}
    calls = {name: forward(layer, x) for name, layer in layers.items()}
    folded = {name: forward(layer, x, fold=True) for name, layer in layers.items()}
    training = alternate(steps, rounds=FLAGS.rounds)
    changed = alternate(
        {name: _after_a_change(layers[name], call) for name, call in calls.items()},
        rounds=FLAGS.rounds,
    )
    remembered = alternate(calls, rounds=FLAGS.rounds)
    constant = alternate(folded, rounds=FLAGS.rounds)
    return [
        Row.ratio(f"{SHAPE} training step", training, "both", "none", at_most=1.03),
        Row.ratio("training step, spectral_norm alone", training, "spectral_norm", "none"),
        Row.ratio("training step, lipschitz_bound alone", training, "lipschitz_bound", "none"),
        Row.ratio("inference", remembered, "both", "none", at_most=1.5),
        Row.ratio(
            "inference, first call after a change of weights", changed, "both", "none", at_most=1.5
        ),
        Row.ratio("inference, condensed as in an export", constant, "both", "none", at_most=1.05),
        *first_compiled_steps(),
    ]


def first_compiled_steps():
    """Rows of the processor time of the first training step, which XLA compiles."""
    _, _, features, heads = JIT_SHAPE
    size = features // heads
    makers = {
        "standard": lambda: _SelfAttention(heads, size),
        "spectral_norm": lambda: L2MultiHeadAttention(heads, size, spectral_norm=1.0),
        "lipschitz_bound": lambda: L2MultiHeadAttention(heads, size, lipschitz_bound=1.0),
    }
    # The first one of the process also starts the compiler.
    _first_step(makers["standard"])
    seconds = {name: [] for name in makers}
    for _ in range(1 if FLAGS.quick else max(1, FLAGS.rounds // 10)):
        for name, maker in makers.items():
            seconds[name].append(_first_step(maker))
    rows = []
    for name in list(makers)[1:]:
        ratio = Spread.of(np.divide(seconds[name], seconds["standard"]))
        rows.append(
            Row(
                f"first compiled training step, {name}, over the standard layer",
                ratio.median,
                "x",
                (ratio.low, ratio.high),
                at_most=1.3,
                details={"standard s": Spread.of(seconds["standard"]).median},
            )
        )
    return rows


class _SelfAttention(keras.layers.MultiHeadAttention):
    def call(self, x):
        return super().call(x, x)

    def build(self, shape):
        super().build(shape, shape)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def _first_step(make_attention):
    """Seconds of processor time of the first step of a new model."""
    batch, length, features, _ = JIT_SHAPE
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((length, features))
    for _ in range(JIT_DEPTH):
        x = x + make_attention()(x)
    logits = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=True)
    x = np.random.default_rng(0).normal(size=(batch, length, features)).astype("float32")
    y = np.zeros(batch, int)
    start = time.process_time()
    model.train_on_batch(x, y)
    return time.process_time() - start


def _after_a_change(layer, call):
    """`call` with weights that no call has seen: norms are computed, not remembered."""
    kernel = layer.query_kernel.value

    def changed():
        kernel.assign(kernel * 1.0001)
        return call()

    return changed


if __name__ == "__main__":
    run("caps_cost", CLAIM, measure)
