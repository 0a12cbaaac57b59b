"""Speed of attention over long sequences, which the layer computes in blocks."""

import keras

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import forward, tokens, training_step

CLAIM = (
    "L2MultiHeadAttention is faster than keras.layers.MultiHeadAttention over long sequences, and "
    "needs no memory for the matrix of scores (batch 1, 128 features, 4 heads; times the standard "
    "layer takes over ours)"
)
FEATURES, HEADS, WINDOW = 128, 4, 128
# Targets by number of tokens.
CASES = {
    "forward": {2048: 1.1, 4096: 1.0, 8192: 1.0},
    "forward, causal": {2048: 1.2, 4096: 1.3, 8192: 1.3},
    "training step": {2048: 1.05, 4096: 0.95, 8192: 0.95},
    "training step, causal": {2048: None, 4096: None, 8192: None},
    f"forward, window {WINDOW}": {2048: 2.0, 4096: 4.0, 8192: 8.0},
}
# Here the standard layer holds several matrices of 4 GiB.
LONGEST = 16384


def measure():
    lengths = (2048, 4096) if FLAGS.quick else (2048, 4096, 8192)
    rows = [compare(case, n, CASES[case][n]) for case in CASES for n in lengths]
    return rows if FLAGS.quick else rows + [alone(case) for case in CASES]


def compare(case, length, target):
    x = tokens(1, length, FEATURES)
    candidates = {
        "standard": program(case, keras.layers.MultiHeadAttention, x, self_attention=True),
        "ours": program(case, L2MultiHeadAttention, x),
    }
    times = alternate(candidates, rounds=FLAGS.rounds, warm_up=1)
    return Row.ratio(f"{length} tokens, {case}", times, "standard", "ours", at_least=target)


def alone(case):
    candidates = {"ours": program(case, L2MultiHeadAttention, tokens(1, LONGEST, FEATURES))}
    times = alternate(candidates, rounds=min(FLAGS.rounds, 5), warm_up=1)
    return Row.sample(f"{LONGEST} tokens, {case}, ours", times.wall["ours"], "s")


def program(case, kind, x, **options):
    window = WINDOW if "window" in case else None
    layer = kind(HEADS, FEATURES // HEADS, sliding_window=window)
    build = training_step if case.startswith("training") else forward
    return build(layer, x, causal="causal" in case, **options)


if __name__ == "__main__":
    run("long_sequences", CLAIM, measure)
