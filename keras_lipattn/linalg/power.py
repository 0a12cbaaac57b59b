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
    fixed = ops.stop_gradient(matrix)
    left = ops.stop_gradient(_unit(ops.matmul(fixed, _or_cold(ops.expand_dims(vector, -1)))))
    image = ops.matmul(ops.swapaxes(matrix, -1, -2), left)
    right = ops.stop_gradient(_unit(ops.stop_gradient(image)))
    sigma = ops.sum(image * right, axis=(-2, -1))
    floor = _frobenius(fixed) / math.sqrt(min(matrix.shape[-2], matrix.shape[-1]))
    missing = ops.stop_gradient(ops.maximum(floor - sigma, 0.0))
    return sigma + missing, ops.squeeze(_or_cold(right), -1)


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


def _or_cold(column):
    # A comparison with NaN is false.
    usable = ops.sum(ops.square(column), axis=-2, keepdims=True) > 0
    cold = cold_vector(column.shape[-2:-1])[:, None]
    return ops.where(usable, column, ops.convert_to_tensor(cold, dtype=column.dtype))


def _unit(column):
    # Scaling by the largest entry first keeps the squares from under- or overflowing; the length
    # is at least 1 then, or the column is zero and stays so.
    column = column / _peak(column)
    length = ops.sqrt(ops.sum(ops.square(column), axis=-2, keepdims=True))
    return column / ops.maximum(length, 1.0)


def _frobenius(matrix):
    """Frobenius norms, and zero where the squares leave the range: no floor then."""
    *batch, rows, columns = matrix.shape
    flat = ops.reshape(matrix, (*batch, 1, rows * columns))
    # As a product: one pass over the matrix.
    squares = ops.matmul(flat, ops.swapaxes(flat, -1, -2))[..., 0, 0]
    return ops.sqrt(ops.where(squares < np.inf, squares, ops.zeros_like(squares)))


def _peak(column):
    """Largest absolute entry, positive even where there is none."""
    smallest = float(np.finfo(keras.backend.standardize_dtype(column.dtype)).tiny)
    return ops.maximum(ops.max(ops.abs(column), axis=-2, keepdims=True), smallest)


def _host_unit(vector):
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)
