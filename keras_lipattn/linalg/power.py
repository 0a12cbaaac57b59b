"""Running estimate of an operator norm: one power step on a persistent vector."""

import math

import keras
import numpy as np
from keras import ops

WARM_UP_STEPS = 30


def power_step(matrix, vector):
    """One power-iteration step; a lower bound of the spectral norm, differentiable in `matrix`.

    The estimate is `u^T W v` for the unit vectors `u ~ W vector` and `v ~ W^T u`, whose gradient is
    that of the norm itself once `v` has converged. It is lifted to `|W|_F / sqrt(min(m, n))`, a
    lower bound too, which keeps a cold vector from seeing nothing; the gradient stays the
    estimate's.

    Args:
        matrix: Tensor `(..., m, n)`.
        vector: Tensor `(..., n)`, right singular vector estimate. Any vector not orthogonal to the
            leading one will do.

    Returns:
        A pair: the estimate `(...)` and the new vector `(..., n)`, no gradient flowing through it.
        A vector of zeros or NaN, given or reached (by a zero matrix, say), is replaced by a fixed
        one: the next step starts afresh.
    """
    *batch, rows, columns = matrix.shape
    fixed = ops.stop_gradient(matrix)
    left, _ = _unit(ops.matmul(fixed, ops.expand_dims(_or_cold(vector), -1)))
    # As a row: the product with the transposed matrix without turning the matrix.
    left = ops.reshape(ops.stop_gradient(left), (*batch, 1, rows))
    right, sigma = _unit(ops.reshape(ops.matmul(left, matrix), (*batch, columns, 1)))
    sigma = ops.reshape(sigma, tuple(batch))
    floor = _frobenius(fixed) / math.sqrt(min(rows, columns))
    missing = ops.stop_gradient(ops.maximum(floor - sigma, 0.0))
    right = ops.reshape(ops.stop_gradient(right), (*batch, columns))
    return sigma + missing, _or_cold(right)


def cold_vector(shape):
    """Unit vectors `(..., n)` to start from, with no reason to be orthogonal to a leading one.

    Random, but always the same: every replica and every restart begins alike.
    """
    return _host_unit(np.random.default_rng(0).standard_normal(shape))


def warm_vector(matrix, *, steps=WARM_UP_STEPS):
    """Right singular vector of `matrix` `(..., m, n)` after `steps` power steps, on the host."""
    matrix = np.asarray(matrix, np.float64)
    vector = cold_vector(matrix.shape[:-2] + matrix.shape[-1:])
    for _ in range(steps):
        moved = np.einsum("...mn,...n->...m", matrix, vector)
        moved = np.einsum("...mn,...m->...n", matrix, moved)
        # A zero or non-finite matrix has no leading vector: keep the cold one.
        usable = np.isfinite(moved).all(-1, keepdims=True) & (np.abs(moved).max(-1) > 0)[..., None]
        vector = np.where(usable, _host_unit(np.where(usable, moved, 1.0)), vector)
    return vector


def _or_cold(vector):
    # A comparison with NaN is false.
    usable = ops.sum(ops.square(vector), axis=-1, keepdims=True) > 0
    cold = cold_vector(vector.shape[-1:])
    return ops.where(usable, vector, ops.convert_to_tensor(cold, dtype=vector.dtype))


def _unit(column):
    """A column `(..., n, 1)` at length one, and its length `(..., 1, 1)`; zero stays zero."""
    # Scaling by the largest entry first keeps the squares from under- or overflowing; the scaled
    # length is at least 1 then, above the floor, or the column is zero and stays so.
    peak = ops.stop_gradient(_peak(column))
    column = column / peak
    length = ops.sqrt(ops.maximum(ops.sum(ops.square(column), axis=-2, keepdims=True), 0.5))
    return column / length, length * peak


def _frobenius(matrix):
    """Frobenius norms, and zero where the squares leave the range: no floor then."""
    *batch, rows, columns = matrix.shape
    flat = ops.reshape(matrix, (*batch, 1, rows * columns))
    # As a product: one pass over the matrix.
    squares = ops.matmul(flat, ops.reshape(matrix, (*batch, rows * columns, 1)))
    squares = ops.reshape(squares, tuple(batch))
    return ops.sqrt(ops.where(squares < np.inf, squares, ops.zeros_like(squares)))


def _peak(column):
    """Largest absolute entry, positive even where there is none."""
    smallest = float(np.finfo(keras.backend.standardize_dtype(column.dtype)).tiny)
    return ops.maximum(ops.max(ops.abs(column), axis=-2, keepdims=True), smallest)


def _host_unit(vector):
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)
