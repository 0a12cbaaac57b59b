"""The orthonormal factor of a matrix, by a Cholesky factorization of its Gram matrix."""

import math

import keras
import numpy as np
import scipy.linalg
from keras import ops

# Smaller weights count as zero: graphs may flush float32 numbers below 1e-38 to zero.
SMALLEST_SCALE = 1e-20
# Times `eps sqrt(n)`: singular matrices of all kinds were seen to fail from 0.25 down.
_SHIFT = 2.0


def orthonormal(matrix, passes=1):
    """`Q` of `matrix = Q R` with orthonormal columns, or rows if there are fewer of them.

    `R` is upper triangular with a positive diagonal, so an orthonormal matrix is its own factor.
    With the Cholesky factor `L L^T` of the Gram matrix, `Q = matrix L^-T`. A pass leaves an error
    of about `eps cond(matrix)^2`, a second one removes what is left of it. The Gram matrix is
    shifted by a few roundoffs, so the norm of `Q` does not exceed 1 by more than roundings. A
    singular matrix has singular values of `Q` below 1, and one without entries of at least 1e-20
    counts as zero.

    Args:
        matrix: Tensor `(m, n)` of a graph.
        passes: Number of passes. Derivatives are those of the exact factor.

    Returns:
        Tensor of the shape of `matrix`.

    Reference:
        Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR for computing the QR
        factorization of ill-conditioned matrices", 2020.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return ops.transpose(orthonormal(ops.transpose(matrix), passes))
    # `Q` does not depend on the scale, which has no derivative then.
    scale = ops.stop_gradient(ops.max(ops.abs(matrix)))
    vanishes = scale < SMALLEST_SCALE
    factor = ops.where(vanishes, ops.zeros_like(matrix), matrix)
    factor = factor / ops.where(vanishes, ops.ones_like(scale), scale)
    for _ in range(passes):
        factor = _factor(factor)
    return factor


def exact_orthonormal(matrix):
    """`orthonormal` on the host in float64, with two passes.

    Args:
        matrix: Array `(m, n)`. One with a NaN or infinite entry gives NaN.

    Returns:
        Float64 array of the shape of `matrix`.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return exact_orthonormal(matrix.T).T
    matrix = np.asarray(matrix, np.float64)
    if not np.isfinite(matrix).all():
        return np.full(matrix.shape, np.nan)
    scale = np.abs(matrix).max()
    factor = matrix / scale if scale >= SMALLEST_SCALE else 0.0 * matrix
    for _ in range(2):
        gram = factor.T @ factor
        shift = _shift(gram.shape[0], "float64") * max(np.abs(gram).sum(axis=0).max(), 1.0)
        lower = np.linalg.cholesky(gram + shift * np.eye(len(gram)))
        factor = scipy.linalg.solve_triangular(lower, factor.T, lower=True).T
    return factor


@ops.custom_gradient
def _factor(matrix):
    """One pass, for a tensor `(m, n)` with `m >= n` whose largest entry is of size 1."""
    dtype = keras.backend.standardize_dtype(matrix.dtype)
    size = matrix.shape[1]
    identity = ops.eye(size, dtype=dtype)
    gram = ops.matmul(ops.transpose(matrix), matrix)
    # NaN would make the factorization fail. It shows in the product with the matrix.
    gram = ops.where(ops.all(ops.isfinite(gram)), gram, identity)
    shift = _shift(size, dtype) * ops.maximum(ops.max(ops.sum(ops.abs(gram), axis=0)), 1.0)
    lower = ops.cholesky(gram + shift * identity)
    # The explicit inverse makes everything else matrix products.
    inverse = ops.solve_triangular(lower, identity, lower=True)
    factor = ops.matmul(matrix, ops.transpose(inverse))

    def gradient(*args, upstream=None):
        if upstream is None:
            (upstream,) = args
        product = ops.tril(ops.matmul(ops.transpose(upstream), factor))
        symmetric = product + ops.transpose(ops.tril(product, -1))
        return ops.matmul(upstream - ops.matmul(factor, symmetric), inverse)

    return factor, gradient


def _shift(size, dtype):
    return _SHIFT * float(np.finfo(dtype).eps) * math.sqrt(size)
