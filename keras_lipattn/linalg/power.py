"""Running estimate of an operator norm: one power step on a persistent vector."""

import math

import keras
import numpy as np
from keras import ops

WARM_UP_STEPS = 30


def power_step(matrix, vector, *, rows=None, columns=None):
    """One power-iteration step; a lower bound of the spectral norm, differentiable in `matrix`.

    The estimate is `u^T W v` for the unit vectors `u ~ W vector` and `v ~ W^T u`, whose gradient is
    that of the norm itself once `v` has converged. It is lifted to `|W|_F / sqrt(min(m, n))`, a
    lower bound too, because the estimate of a cold vector may be near 0. The gradient is that of
    the estimate.

    Args:
        matrix: Tensor `(..., m, n)`.
        vector: Tensor `(..., n)`, right singular vector estimate. Any vector not orthogonal to the
            leading one will do.
        rows: Tensor `(..., m)` or `None`; the step is one of `diag(rows) matrix diag(columns)`,
            which is not formed, and differentiable in both.
        columns: Tensor `(..., n)` or `None`.

    Returns:
        A pair: the estimate `(...)` and the new vector `(..., n)`, no gradient flowing through it.
        A vector of zeros or NaN, given or computed (of a zero matrix, for instance), is replaced
        by a fixed one.
    """
    *batch, height, width = matrix.shape
    # All vectors are rows `(..., 1, n)`, but where a product wants a column.
    rows, columns = (_as_row(weights) for weights in (rows, columns))
    fixed, fixed_rows, fixed_columns = map(_fixed, (matrix, rows, columns))
    image = ops.matmul(fixed, _turned(_times(_as_row(vector), fixed_columns)))
    image = _times(_turned(image), fixed_rows)
    # Scaling by the largest entry first keeps squares from under- or overflowing.
    smallest = float(np.finfo(keras.backend.standardize_dtype(image.dtype)).tiny)
    peak = ops.maximum(ops.max(ops.abs(image), axis=-1, keepdims=True), smallest)
    left, length, usable = _unit(image / peak)
    # The next image is no shorter than this one, and not much longer: it is scaled by its length.
    length = ops.where(usable, peak * length, 1.0)
    image = _times(ops.matmul(_times(left, rows), matrix), columns)
    right, _, _ = _unit(ops.stop_gradient(image) / length)
    sigma = ops.reshape(ops.matmul(image, _turned(right)), tuple(batch))
    floor = _frobenius(fixed, fixed_rows, fixed_columns) / math.sqrt(min(height, width))
    missing = ops.maximum(floor - ops.stop_gradient(sigma), 0.0)
    return sigma + missing, ops.reshape(right, (*batch, width))


def cold_vector(shape):
    """Random unit vectors `(..., n)` to start from, equal on every replica and after a restart."""
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


def _as_row(vector):
    return None if vector is None else ops.expand_dims(vector, -2)


def _turned(vector):
    """A row as a column or the other way round: a change of shape alone."""
    *batch, height, width = vector.shape
    return ops.reshape(vector, (*batch, width, height))


def _fixed(tensor):
    return None if tensor is None else ops.stop_gradient(tensor)


def _times(row, weights):
    return row if weights is None else row * weights


def _unit(row):
    """A row `(..., 1, n)` at length one, its length, and whether that is neither zero nor NaN.

    The cold vector takes the place of a row that has no direction. Squares are summed by a product:
    XLA compiles it faster than a reduction.
    """
    squares = ops.matmul(row, _turned(row))
    # A comparison with NaN is false.
    usable = squares > 0.0
    length = ops.sqrt(ops.where(usable, squares, 1.0))
    cold = ops.convert_to_tensor(cold_vector(row.shape[-1:]), dtype=row.dtype)
    return ops.where(usable, row / length, cold), length, usable


def _frobenius(matrix, rows, columns):
    """Frobenius norms, and zero where the squares leave the range: no floor then."""
    squares = ops.square(matrix)
    if rows is None and columns is None:
        squares = ops.sum(squares, axis=(-2, -1))
    elif rows is None:
        squares = ops.sum(ops.matmul(squares, _turned(ops.square(columns))), axis=(-2, -1))
    else:
        squares = _times(ops.matmul(ops.square(rows), squares), _squared(columns))
        squares = ops.sum(squares, axis=(-2, -1))
    return ops.sqrt(ops.where(squares < np.inf, squares, ops.zeros_like(squares)))


def _squared(tensor):
    return None if tensor is None else ops.square(tensor)


def _host_unit(vector):
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)
