"""Attention layers and `keras.layers.MultiHeadAttention` on JAX or PyTorch, with fused paths on.

    KERAS_BACKEND=jax python -m tools.benchmark.backend_attention --minutes=8

Meant for a GPU; `--quick` is small enough for a CPU. The program ends within its minutes: a case
that does not fit, in time or in memory, is a row with its reason.
"""

import os
from dataclasses import dataclass

import keras
import numpy as np
from absl import app, flags
from keras import ops

from keras_lipattn import (
    BoundedMultiHeadAttention,
    L2MultiHeadAttention,
    ScaledCosineAttention,
)
from keras_lipattn.linalg.gram import NUM_SQUARINGS, gram_upper_bound
from tools.benchmark._backend_accuracy import row_error
from tools.benchmark._backend_steps import call, layer_step
from tools.benchmark._budget import run_within
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
flags.DEFINE_float("minutes", 8.0, "Time limit of the program.", 0.0)

CLAIM = (
    "Attention with Lipschitz constants against keras.layers.MultiHeadAttention on the same "
    "backend (times the standard layer takes over ours; shares of the speed of a large matrix "
    "product)"
)
# What matters most comes first: the longest may not fit in the time.
LENGTHS = [1024, 16384, 4096, 512, 8192, 2048]
KINDS = ["forward", "training step"]
LAYERS = {
    "standard": keras.layers.MultiHeadAttention,
    "L2": L2MultiHeadAttention,
    "cosine": ScaledCosineAttention,
    "bounded": BoundedMultiHeadAttention,
}
# Rows of weights are rounded to the dtype, twice at most; scores must not add to that.
ROW_ERRORS = {"bfloat16": 1e-2, "float16": 2e-3}
# Rounds of a second give a median that is steady enough on a device of its own.
SECONDS = 0.02
# Seconds that are kept for the start and the end of the program.
RESERVED = 15.0


@dataclass(frozen=True)
class Case:
    """One measurement, in the process that makes it.

    Attributes:
        what: Entry of `MEASURES`, or one of `KINDS`.
        dtype: Compute dtype of the layers.
        shape: Batch, tokens, features and heads.
        rounds: Rounds of a median.
    """

    what: str
    dtype: str
    shape: tuple[int, int, int, int]
    rounds: int


def measure():
    backend = keras.backend.backend()
    if backend not in ("jax", "torch"):
        raise app.UsageError(f"Set KERAS_BACKEND to jax or torch. Received: {backend!r}")
    cases = all_cases()
    limits, rows = {}, []
    seconds = max(0.0, 60.0 * FLAGS.minutes - RESERVED)
    for case, (result, reason) in zip(cases, run_within(seconds, measured, cases), strict=True):
        found = result or [Row(name_of(case), None, "x", details={"reason": reason})]
        for row in found:
            print(f"{row.case}: {row.value} {row.unit} {row.details}", flush=True)
        if case.what == "matrix product":
            limits[case.dtype] = found[0].value
        for row in found:
            add_shares(row, limits.get(case.dtype))
        rows += found
    return rows


def all_cases():
    features, heads = chosen("features", 128, 1024), chosen("heads", 4, 16)
    tokens = chosen("tokens", 1024, 16384)

    def case(what, dtype, length):
        return Case(what, dtype, (max(1, tokens // length), length, features, heads), FLAGS.rounds)

    lengths = FLAGS.lengths or ([128, 512] if FLAGS.quick else LENGTHS)
    first = [
        case(what, dtype, lengths[0])
        for dtype in FLAGS.dtypes
        for what in ("matrix product", "row error", "norms")
        # On a GPU no layer goes through a kernel in float32, and norms are float32.
        if what == "matrix product" or (what == "norms") == (dtype == "float32")
    ]
    compared = [
        case(what, dtype, n) for n in lengths for dtype in reversed(FLAGS.dtypes) for what in KINDS
    ]
    capped = [case(f"caps, {what}", dtype, lengths[0]) for dtype in FLAGS.dtypes for what in KINDS]
    # Caps after the first length, so that they are measured whatever the rest takes.
    here = len(FLAGS.dtypes) * len(KINDS)
    return first + compared[:here] + capped + compared[here:]


def chosen(name, quick, full):
    return FLAGS[name].value or (quick if FLAGS.quick else full)


def name_of(case):
    return f"{case.dtype} {case.shape} {case.what}"


def add_shares(row, limit):
    """Replaces GFLOP/s by shares of a limit in GFLOP/s, where there is one."""
    if limit is None:
        return
    for key in [key for key in row.details if key.endswith(" GFLOP/s")]:
        row.details[key.replace("GFLOP/s", "share")] = row.details.pop(key) / limit


def measured(case: Case) -> list[Row]:
    """Rows of a case."""
    if case.what in MEASURES:
        return MEASURES[case.what](case)
    capped = case.what.startswith("caps")
    layers = layers_with_caps(case) if capped else layers_to_compare(case)
    times, details, reasons = timed(case, layers)
    # Caps are a cost, so that they stand above the line; the standard layer is what ours replace.
    base = next(iter(layers))
    rows = []
    for name in list(layers)[1:]:
        about = {key: details[key] for key in details if key.startswith((f"{base} ", f"{name} "))}
        title = f"{name_of(case)}, {name}"
        if name in reasons or base in reasons:
            why = "; ".join(reasons[each] for each in (base, name) if each in reasons)
            rows.append(Row(title, None, "x", details={"reason": why} | about))
            continue
        row = Row.ratio(title, times, *((name, base) if capped else (base, name)))
        row.details.update(about)
        rows.append(row)
    return rows


def layers_to_compare(case):
    _, _, features, heads = case.shape
    return {
        name: kind(heads, features // heads, dtype=policy(case.dtype))
        for name, kind in LAYERS.items()
    }


def layers_with_caps(case):
    _, _, features, heads = case.shape
    caps = {"uncapped": {}, "capped": dict(spectral_norm=1.0, lipschitz_bound=1.0)}
    return {
        name: L2MultiHeadAttention(heads, features // heads, dtype=policy(case.dtype), **options)
        for name, options in caps.items()
    }


def policy(dtype):
    return dtype if dtype == "float32" else f"mixed_{dtype}"


def timed(case, layers):
    """`Rounds` of the layers that fit, numbers about them, and reasons of the others."""
    batch, length, features, _ = case.shape
    training = case.what.endswith("training step")
    x = ops.cast(np.random.default_rng(0).standard_normal((batch, length, features)), case.dtype)
    candidates, details, reasons = {}, {}, {}
    for name, layer in layers.items():
        inputs = (x, x) if name == "standard" else (x,)
        try:
            layer.build(*(each.shape for each in inputs))
            candidates[name], mib = layer_step(layer, inputs, training=training)
            candidates[name]()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            candidates.pop(name, None)
            reasons[name] = f"{name} needs too much memory"
            continue
        if mib is not None:
            details[f"{name} MiB"] = mib
    times = alternate(candidates, rounds=case.rounds, warm_up=1, seconds=SECONDS)
    for name in candidates:
        milliseconds = times.milliseconds(name)
        needed = operations(name, batch, length, features) * (3 if training else 1)
        details[f"{name} ms"] = milliseconds
        details[f"{name} GFLOP/s"] = needed / milliseconds / 1e6
    return times, details, reasons


def is_out_of_memory(error):
    """Whether an error of a backend is about memory: each reports it differently."""
    parts = ("out of memory", "exhausted", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in parts)


def operations(name, batch, length, features):
    """Operations in the products of a forward pass, as many features out as in.

    Scores and mixing take as much for all. With distances there are two projections, not four.
    """
    projections = 4 if name in ("standard", "cosine", "bounded") else 2
    per_token = projections * 2.0 * features**2 + 4.0 * length * features
    return batch * length * per_token


def product_row(case):
    """Operations a second of a product of square matrices, the most this run can hope for."""
    side = min(8192, 8 * case.shape[2])
    matrix = ops.cast(np.random.default_rng(0).standard_normal((side, side)), case.dtype)
    rounds = alternate({"product": call(ops.matmul, matrix, matrix)}, rounds=case.rounds)
    speed = 2.0 * side**3 / rounds.milliseconds("product") / 1e6
    return [Row(f"{case.dtype} matrix product", speed, "GFLOP/s", details={"side": side})]


def norms_row(case):
    """Milliseconds of the upper bound of one operator norm that caps take at inference."""
    side = case.shape[2]
    matrix = ops.cast(np.random.default_rng(0).standard_normal((side, side)), "float32")
    rounds = alternate({"norm": call(gram_upper_bound, matrix)}, rounds=case.rounds)
    milliseconds = rounds.milliseconds("norm")
    # The Gram matrix, and as many squarings.
    speed = (1 + NUM_SQUARINGS) * 2.0 * side**3 / milliseconds / 1e6
    row = Row.sample(f"{case.dtype} Gram norm of {side} x {side}", rounds.wall["norm"] * 1e3, "ms")
    row.details["norm GFLOP/s"] = speed
    return [row]


def row_error_row(case):
    """Error of rows of attention weights through the fused kernel, where squares cancel."""
    rows = []
    for center in (0.0, 5.0):
        error = row_error(case.dtype, center=center)
        title = f"{case.dtype} error of rows through the kernel, keys around {center:g}"
        rows.append(Row(title, error, "total variation", at_most=ROW_ERRORS[case.dtype]))
    return rows


MEASURES = {"matrix product": product_row, "norms": norms_row, "row error": row_error_row}


if __name__ == "__main__":
    # The process that measures must find the memory of the device free.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run("backend_attention", CLAIM, measure)
