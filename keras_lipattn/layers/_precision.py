"""Weights in the dtype a layer computes in, and caps that hold after rounding to it."""

import math

import ml_dtypes
import numpy as np
from keras import ops

from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# A cap aims this much below itself, so that float32 roundings of the scaled weights stay under it.
CAP_MARGIN = 1e-6
# numpy knows bfloat16 only through ml_dtypes.
_HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def cast_to_compute_dtype(weight, dtype):
    """A variable or array as float64 numpy, rounded to the dtype a layer computes in."""
    value = getattr(weight, "value", weight)
    if isinstance(value, np.ndarray) and dtype in _HALF:
        # Without operations of the backend, which give no numbers while a graph is traced.
        with np.errstate(over="ignore", invalid="ignore"):
            return value.astype(np.float32).astype(_HALF[dtype]).astype(np.float64)
    return ops.convert_to_numpy(ops.cast(value, dtype)).astype(np.float64)


def is_finite(weight, dtype):
    """Whether every entry is a finite number in that dtype; true for `None`."""
    return weight is None or bool(np.isfinite(cast_to_compute_dtype(weight, dtype)).all())


def cap_factor(norm, cap, xp, *, margin=CAP_MARGIN):
    """`min(1, cap / norm)`: multiplied with it, a map of constant `norm` has at most `cap`.

    The derivative flows through `norm` where the cap is active. A norm that is NaN stays NaN, so
    that broken weights show.
    """
    target = cap * (1.0 - margin)
    return target / xp.maximum(norm, target)


def cap_margin(dtype, shape):
    """How far below itself a cap must aim for a matrix that is rounded to `dtype` afterwards.

    Rounding changes each entry by a relative `u` at most. Hence it changes the 2-norm by at most
    `u |W|_F`, which is at most `u sqrt(min(rows, columns))` times the norm, and sums of absolute
    entries by at most `2 u`.
    """
    if dtype not in _HALF:
        return CAP_MARGIN
    return CAP_MARGIN + UNIT_ROUNDOFF[dtype] * max(2.0, math.sqrt(min(shape)))
