"""Linear maps of the last axis, stored so that consecutive ones merge."""

import math

import numpy as np

from keras_lipattn.bounds.content_cache import cached_by_content
from keras_lipattn.linalg import SAFETY, fast_operator_norm

# A map of the last axis: a matrix of shape `(d_in, d_out)` that acts as `x @ matrix`, its
# diagonal of shape `(d,)`, or `None` for the identity.
LinearMap = np.ndarray | None


def compose(first: LinearMap, second: LinearMap) -> LinearMap:
    """The map `x -> (x first) second`."""
    if first is None:
        return second
    if second is None:
        return first
    if first.ndim == 1:
        return first * second if second.ndim == 1 else first[:, None] * second
    return first * second if second.ndim == 1 else first @ second


def add(first: LinearMap, second: LinearMap, width: int) -> LinearMap:
    """The map `x -> x first + x second`; `width` is the last axis of the result."""
    first = np.ones(width) if first is None else first
    second = np.ones(width) if second is None else second
    if first.ndim == second.ndim:
        return first + second
    return as_matrix(first, width) + as_matrix(second, width)


def as_matrix(linear: LinearMap, width: int) -> np.ndarray:
    """The map as a matrix; `width` is the last axis of the result."""
    if linear is None:
        return np.eye(width)
    return np.diag(linear) if linear.ndim == 1 else linear


def matrix_norm(linear: LinearMap, norm: str) -> float:
    """Lipschitz constant of `x -> x @ matrix` on every token, an upper bound.

    In the 2-norm and the token norm it is the spectral norm, in the max norm the largest sum
    of the absolute entries of a column. All three are exact. `inf` when an entry is not finite.
    """
    if linear is None:
        return 1.0
    if linear.size == 0:
        return 0.0
    if not np.isfinite(linear).all():
        return np.inf
    if linear.ndim == 1:
        return float(np.abs(linear).max())
    if norm == "linf":
        return SAFETY * float(np.abs(linear).sum(axis=0).max())
    # Local certificates of one model need the same norms for every center.
    return cached_by_content(_spectral_norm, linear)


def _spectral_norm(matrix: np.ndarray) -> float:
    return SAFETY * fast_operator_norm(matrix)


def centered_diagonal_norm(gamma: np.ndarray) -> float:
    """`|| diag(gamma) (I - 11^T / d) ||`, exact up to rounding upwards.

    Its square is the largest eigenvalue of `D^2 - g g^T / d` with `D = diag(gamma)`, the root of
    `1 + sum_i (g_i^2 / d) / (x - g_i^2)` between the two largest `g_i^2`, where the sum decreases.
    The result is the upper end of an interval of bisection.

    Args:
        gamma: float64, finite, shape `(d,)`.

    Returns:
        A float.
    """
    scale = float(np.abs(gamma).max(initial=0.0))
    if scale == 0.0 or gamma.size == 1:
        return 0.0
    squares = np.sort(np.square(gamma / scale))
    low, high = squares[-2], squares[-1]
    for _ in range(100):
        middle = 0.5 * (low + high)
        with np.errstate(divide="ignore"):
            sums = 1.0 + float(np.sum(squares / (middle - squares))) / squares.size
        if not low < middle < high:
            break
        # Above the root the term of the largest entry makes the sum negative.
        low, high = (middle, high) if sums > 0.0 else (low, middle)
    return SAFETY * scale * math.sqrt(high)
