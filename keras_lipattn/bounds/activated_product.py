"""Section 8 of docs/theory.md: a linear map, an elementwise function and a linear map."""

import numpy as np

from keras_lipattn.bounds.head_scaling import frobenius_scaling, polished_scaling
from keras_lipattn.linalg import SAFETY, cached_by_content, fast_operator_norm

# With more functions the scaling of a longer search is a few thousandths smaller at most.
_MOST_POLISHED = 256


def activated_product_constant(
    before: np.ndarray, after: np.ndarray, slopes: tuple[float, float], norm: str
) -> float:
    """Constant of `x -> f(x @ before) @ after` on every token, for functions `f` of single entries.

    The derivative of `f` is the diagonal matrix `m I + h E` with entries of `E` in `[-1, 1]`.

    Args:
        before: float64, shape `(d, n)`.
        after: float64, shape `(n, e)`.
        slopes: lower and upper bound of the slopes of `f`.
        norm: `"l2"`, `"token"` or `"linf"`.

    Returns:
        A float, `inf` if an entry is not finite. Nearly always below the product of the constants:
        take the smaller one.
    """
    low, high = slopes
    if not (np.isfinite(before).all() and np.isfinite(after).all() and low <= high):
        return np.inf
    if 0 in (*before.shape, *after.shape):
        return 0.0
    middle, half = abs(low + high) / 2.0, (high - low) / 2.0
    if norm == "linf":
        both = middle * np.abs(before @ after) + half * np.abs(before) @ np.abs(after)
        return SAFETY * float(both.sum(axis=0).max())
    return cached_by_content(_spectral, before, after, middle, half)


def activated_gap_constants(
    before: np.ndarray, after: np.ndarray, slopes: tuple[float, float], norm: str
) -> np.ndarray:
    """Constants of `x -> f(x @ before) @ (after[:, y] - after[:, j])` for all pairs of columns.

    Args:
        before: float64, shape `(d, n)`.
        after: float64, shape `(n, e)`.
        slopes: lower and upper bound of the slopes of `f`.
        norm: `"l2"`, `"token"` or `"linf"`.

    Returns:
        Shape `(e, e)`, `inf` where an entry of a kernel is not finite.
    """
    low, high = slopes
    classes = after.shape[1]
    if not (np.isfinite(before).all() and np.isfinite(after).all() and low <= high):
        return np.full((classes, classes), np.inf)
    if 0 in (*before.shape, *after.shape):
        return np.zeros((classes, classes))
    middle, half = abs(low + high) / 2.0, (high - low) / 2.0
    scale = frobenius_scaling(before.T[:, :, None], after[:, None, :], np)
    # One scaling for all pairs, and none.
    scalings = [
        (t[:, None], float(fast_operator_norm(before * t))) for t in (scale, np.ones_like(scale))
    ]
    constants = np.empty((classes, classes))
    for label in range(classes):
        # Differences instead of a Gram expansion, which cancels for close columns.
        gaps = after[:, label : label + 1] - after
        if norm == "linf":
            parts = np.abs(before @ gaps), np.abs(before) @ np.abs(gaps)
            average, spread = (part.sum(axis=0) for part in parts)
        else:
            average = np.linalg.norm(before @ gaps, axis=0)
            sizes = [size * np.linalg.norm(gaps / t, axis=0) for t, size in scalings]
            spread = np.minimum(*sizes)
        constants[label] = SAFETY * (middle * average + half * spread)
    return constants


def _spectral(before: np.ndarray, after: np.ndarray, middle: float, half: float) -> float:
    """`middle ||W_1 W_2|| + half min_T ||W_1 T|| ||T^-1 W_2||` for positive diagonal `T`."""
    sizes = [float(max(matrix.max(), -matrix.min())) for matrix in (before, after)]
    if 0.0 in sizes:
        return 0.0
    if min(sizes) < 1e-50 or max(sizes) > 1e50:
        # Products of matrices of size 1 neither overflow nor underflow.
        before, after = before / sizes[0], after / sizes[1]
    else:
        sizes = [1.0, 1.0]

    def split(scale: np.ndarray) -> float:
        parts = fast_operator_norm(before * scale), fast_operator_norm(after / scale[:, None])
        return float(parts[0] * parts[1])

    heads = before.T[:, :, None], after[:, None, :]
    start = frobenius_scaling(*heads, np)
    value = split(start)
    if len(start) <= _MOST_POLISHED:
        value = min(value, split(polished_scaling("l2", *heads, start)[0]))
    value *= half
    if middle > 0.0:
        value += middle * float(fast_operator_norm(before @ after))
    return SAFETY * value * sizes[0] * sizes[1]
