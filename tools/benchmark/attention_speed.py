"""How much faster the layer is than `keras.layers.MultiHeadAttention` with the same arguments."""

import keras
from absl import flags

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import forward, tokens, training_step

flags.DEFINE_bool("jit", False, "Compile both layers with XLA.")

CLAIM = (
    "L2MultiHeadAttention is faster than keras.layers.MultiHeadAttention with the same heads and "
    "key_dim (times the standard layer takes over ours)"
)
# (batch, tokens, features, heads): targets of the forward pass and of the training step.
SHAPES = {
    (8, 128, 256, 8): (1.4, 1.25),
    (32, 64, 128, 4): (1.3, 1.2),
    (4, 256, 512, 8): (1.4, 1.25),
    (2, 1024, 256, 8): (1.2, 1.1),
}


def measure():
    return [row for shape, targets in SHAPES.items() for row in compare(shape, *targets)]


def compare(shape, forward_target, step_target):
    batch, length, features, heads = shape
    x = tokens(batch, length, features)
    ours = L2MultiHeadAttention(heads, features // heads)
    peer = keras.layers.MultiHeadAttention(heads, features // heads)
    inference = {
        "standard": forward(peer, x, self_attention=True, jit=FLAGS.jit),
        "ours": forward(ours, x, jit=FLAGS.jit),
        "ours condensed": forward(ours, x, fold=True, jit=FLAGS.jit),
    }
    training = {
        "standard": training_step(peer, x, self_attention=True, jit=FLAGS.jit),
        "ours": training_step(ours, x, jit=FLAGS.jit),
    }
    times = alternate(inference, rounds=FLAGS.rounds)
    steps = alternate(training, rounds=FLAGS.rounds)
    return [
        Row.ratio(f"{shape} forward", times, "standard", "ours", at_least=forward_target),
        Row.ratio(f"{shape} forward, condensed", times, "standard", "ours condensed"),
        Row.ratio(f"{shape} training step", steps, "standard", "ours", at_least=step_target),
    ]


if __name__ == "__main__":
    run("attention_speed", CLAIM, measure)
