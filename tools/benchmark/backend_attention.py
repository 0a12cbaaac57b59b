"""The layer and `keras.layers.MultiHeadAttention` on JAX or PyTorch, each with its fused path on.

    KERAS_BACKEND=jax python -m tools.benchmark.backend_attention

Meant for a GPU; `--quick` is small enough for a CPU. A case that does not fit in memory is a row
with its reason.
"""

import keras
import numpy as np
from absl import app, flags
from keras import ops

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._backend_steps import layer_step, product
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate

flags.DEFINE_multi_integer("lengths", None, "Lengths of the sequences; 512 to 16384 by default.")
flags.DEFINE_multi_enum(
    "dtypes", ["float32", "bfloat16"], ["float32", "float16", "bfloat16"], "Dtypes of the policy."
)
flags.DEFINE_integer("tokens", None, "Tokens of a batch, 16384 by default.", 1)
flags.DEFINE_integer("features", None, "Features of a token, 1024 by default.", 1)
flags.DEFINE_integer("heads", None, "Heads, 16 by default.", 1)

CLAIM = (
    "L2MultiHeadAttention against keras.layers.MultiHeadAttention on the same backend "
    "(times the standard layer takes over ours; shares of what a large matrix product reaches)"
)
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]


def measure():
    backend = keras.backend.backend()
    if backend not in ("jax", "torch"):
        raise app.UsageError(f"Set KERAS_BACKEND to jax or torch. Received: {backend!r}")
    lengths = FLAGS.lengths or ([128, 512] if FLAGS.quick else LENGTHS)
    rows = []
    for dtype in FLAGS.dtypes:
        limit = product_speed(dtype)
        rows.append(Row(f"{dtype} matrix product", limit / 1e9, "GFLOP/s"))
        for length in lengths:
            for training in (False, True):
                rows.append(compare(length, dtype, training, limit))
    return rows


def chosen(name, quick, full):
    return FLAGS[name].value or (quick if FLAGS.quick else full)


def product_speed(dtype):
    """Operations a second of a product of square matrices, the most this run can hope for."""
    side = 1024 if FLAGS.quick else 8192
    matrix = ops.cast(np.random.default_rng(0).standard_normal((side, side)), dtype)
    rounds = alternate({"product": product(matrix)}, rounds=FLAGS.rounds)
    return 2.0 * side**3 / (rounds.milliseconds("product") / 1e3)


def compare(length, dtype, training, limit):
    features, heads = chosen("features", 128, 1024), chosen("heads", 4, 16)
    batch = max(1, chosen("tokens", 1024, 16384) // length)
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    x = ops.cast(np.random.default_rng(0).standard_normal((batch, length, features)), dtype)
    layers = {
        "ours": L2MultiHeadAttention(heads, features // heads, dtype=policy),
        "standard": keras.layers.MultiHeadAttention(heads, features // heads, dtype=policy),
    }
    kind = "training step" if training else "forward"
    case = f"{dtype} {(batch, length, features, heads)} {kind}"
    candidates, details = {}, {}
    for name, layer in layers.items():
        inputs = (x, x) if name == "standard" else (x,)
        layer.build(*(each.shape for each in inputs))
        try:
            candidates[name], mib = layer_step(layer, inputs, training=training)
            candidates[name]()
        except Exception as error:
            # Each backend has its own class for too little memory.
            if not any(word in str(error).lower() for word in ("out of memory", "exhausted")):
                raise
            return Row(case, None, "x", details={"reason": f"{name} needs too much memory"})
        if mib is not None:
            details[f"{name} MiB"] = mib
    rounds = alternate(candidates, rounds=FLAGS.rounds)
    row = Row.ratio(case, rounds, "standard", "ours")
    for name in layers:
        seconds = rounds.milliseconds(name) / 1e3
        needed = operations(name, batch, length, features) * (3 if training else 1)
        row.details[f"{name} share"] = needed / seconds / limit
    row.details.update(details)
    return row


def operations(name, batch, length, features):
    """Operations in the products of a forward pass, as many features out as in.

    Scores and mixing take as much for both; the standard layer has twice the projections.
    """
    projections = 2 if name == "ours" else 4
    per_token = projections * 2.0 * features**2 + 4.0 * length * features
    return batch * length * per_token


if __name__ == "__main__":
    run("backend_attention", CLAIM, measure)
