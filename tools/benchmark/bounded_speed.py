"""Speed of `BoundedMultiHeadAttention` against `keras.layers.MultiHeadAttention`."""

import keras

from keras_lipattn import BoundedMultiHeadAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import forward, tokens, training_step

CLAIM = (
    "BoundedMultiHeadAttention is about as fast as keras.layers.MultiHeadAttention with the same "
    "arguments (times the standard layer takes over ours)"
)
# (batch, tokens, features, heads)
SHAPES = [(8, 128, 256, 8), (32, 64, 128, 4), (4, 256, 512, 8), (2, 1024, 256, 8)]
UNCAPPED, CAPPED, CONDENSED = 0.93, 0.87, 0.97


def measure():
    return [row for shape in SHAPES for row in compare(shape)]


def compare(shape):
    batch, length, features, heads = shape
    x = tokens(batch, length, features)
    # Standard normal tokens have norms about sqrt(features): half of them are projected.
    options = {"num_heads": heads, "key_dim": features // heads}
    bounded = {**options, "token_radius": features**0.5}
    peer = keras.layers.MultiHeadAttention(**options)
    ours = BoundedMultiHeadAttention(**bounded)
    capped = BoundedMultiHeadAttention(**bounded, lipschitz_bound=1.0, lipschitz_norm="token")
    inference = {
        "standard": forward(peer, x, self_attention=True),
        "ours": forward(ours, x),
        "capped": forward(capped, x),
        "condensed": forward(capped, x, fold=True),
    }
    training = {
        "standard": training_step(peer, x, self_attention=True),
        "ours": training_step(ours, x),
        "capped": training_step(capped, x),
    }
    times = alternate(inference, rounds=FLAGS.rounds)
    steps = alternate(training, rounds=FLAGS.rounds)
    return [
        Row.ratio(f"{shape} {case}", rounds, "standard", name, at_least=target)
        for case, rounds, name, target in (
            ("forward", times, "ours", UNCAPPED),
            ("forward, capped", times, "capped", CAPPED),
            ("forward, condensed", times, "condensed", CONDENSED),
            ("training step", steps, "ours", UNCAPPED),
            ("training step, capped", steps, "capped", CAPPED),
        )
    ]


if __name__ == "__main__":
    run("bounded_speed", CLAIM, measure)
