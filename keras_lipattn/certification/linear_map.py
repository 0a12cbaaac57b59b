"""Linear maps of the last axis, stored so that consecutive ones merge."""

import collections

import numpy as np

from keras_lipattn.linalg import SAFETY, cached_by_content, computed_from, fast_operator_norm

# A map of the last axis: a matrix of shape `(d_in, d_out)` that acts as `x @ matrix`, its
# diagonal of shape `(d,)`, or `None` for the identity.
LinearMap = np.ndarray | None

# The last products of matrices.
_products: collections.deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = collections.deque(
    maxlen=2
)


def compose(first: LinearMap, second: LinearMap) -> LinearMap:
    """The map `x -> (x first) second`."""
    if first is None:
        return second
    if second is None:
        return first
    if first.ndim == 1:
        return first * second if second.ndim == 1 else first[:, None] * second
    if second.ndim == 1:
        return first * second
    # A certificate needs each product in several norms, one after the other.
    for a, b, product in tuple(_products):
        if a is first and b is second:
            return product
    product = computed_from(_product(first, second), "product", first, second)
    _products.append((first, second, product))
    return product


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`first @ second`, in fewer steps if a factor subtracts means and scales."""
    parts = _centering(first)
    if parts is not None:
        diagonal, row = parts
        product = second * diagonal[:, None]
        product += row @ second
        return product
    parts = _centering(second)
    if parts is not None:
        diagonal, row = parts
        product = first * diagonal
        product += first.sum(axis=1)[:, None] * row
        return product
    return first @ second


def _centering(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """`(d, c)` if the matrix is `diag(d) + 1 c^T`, as a centering of tokens is, else `None`."""
    width = len(matrix)
    if width < 3 or matrix.shape != (width, width):
        return None
    row = matrix[0].copy()
    row[0] = matrix[1, 0]
    # The first two rows exclude nearly all matrices.
    if not np.array_equal(matrix[1, 2:], row[2:]):
        return None
    same = matrix == row
    np.fill_diagonal(same, True)
    return (matrix.diagonal() - row, row) if same.all() else None


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


def of_coefficient(coefficient: float | np.ndarray, width: int | None) -> LinearMap:
    """The map `x -> coefficient * x`, for a number or an array of shape `(width,)`."""
    if np.ndim(coefficient) == 0:
        if coefficient == 1.0 or width is None:
            return None
        return np.full(width, float(coefficient))
    return np.asarray(coefficient, np.float64)


def largest_size(coefficient: float | np.ndarray) -> float:
    """Largest absolute value of a coefficient."""
    return float(np.max(np.abs(coefficient)))


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
