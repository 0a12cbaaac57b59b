"""Shrinking to a cap."""

import math

from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# A cap aims this much below itself, so that float32 roundings of the scaled weights stay under it.
CAP_MARGIN = 1e-6


def cap_factor(norm, cap, xp, *, margin=CAP_MARGIN):
    """`min(1, cap / norm)`: what a map of constant `norm` is multiplied with to have at most `cap`.

    Only ever shrinks. The derivative flows through `norm` where the cap is active. A norm which is
    not a number stays one, so that broken weights are seen and not hidden.
    """
    target = cap * (1.0 - margin)
    return target / xp.maximum(norm, target)


def cap_margin(dtype, shape):
    """How far below itself a cap must aim for a matrix that is rounded to `dtype` afterwards.

    Rounding changes each entry by a relative `u` at most, hence the 2-norm by `u |W|_F`, which is
    at most `u sqrt(min(rows, columns))` times itself, and sums of absolute entries by `2 u`.
    """
    if dtype not in ("bfloat16", "float16"):
        return CAP_MARGIN
    return CAP_MARGIN + UNIT_ROUNDOFF[dtype] * max(2.0, math.sqrt(min(shape)))
