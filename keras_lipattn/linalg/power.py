"""Running estimate of an operator norm: one power step on a persistent vector."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

WARM_UP_STEPS = 30


@dataclasses.dataclass(frozen=True)
class ScaledMatrix:
    """`diag(rows) matrix diag(columns)`, which a power step does not form.

    Attributes:
        matrix: Tensor or array `(..., m, n)`.
        rows: Factors of the rows `(..., m)`, or `None`.
        columns: Factors of the columns `(..., n)`, or `None`.
        frobenius: Frobenius norm `(...)` of the product, or `None` for a power step to find it. No
            gradient flows through it.
    """

    matrix: Any
    rows: Any = None
    columns: Any = None
    frobenius: Any = None

    @property
    def shape(self):
        return self.matrix.shape

    @property
    def dtype(self):
        return self.matrix.dtype

    def formed(self, xp):
        """The product itself, in the array namespace `xp`: `numpy` or `keras.ops`."""
        product = self.matrix
        if self.rows is not None:
            product = product * xp.expand_dims(self.rows, -1)
        if self.columns is not None:
            product = product * xp.expand_dims(self.columns, -2)
        return product


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """`left right` for each of a batch of pairs, which a power step does not form.

    Attributes:
        left: Tensor or array `(H, m, k)`.
        right: Tensor or array `(H, k, n)`.
        stacked: Whether the products are below each other, as one matrix `(H * m, n)`.
    """

    left: Any
    right: Any
    stacked: bool = False

    @property
    def shape(self):
        heads, height, _ = self.left.shape
        width = self.right.shape[-1]
        return (heads * height, width) if self.stacked else (heads, height, width)

    @property
    def dtype(self):
        return self.right.dtype

    def formed(self, xp):
        """The products themselves, in the array namespace `xp`: `numpy` or `keras.ops`."""
        product = xp.matmul(self.left, self.right)
        return xp.reshape(product, self.shape) if self.stacked else product


def power_step(matrix, vector):
    """One power-iteration step; a lower bound of the spectral norm, differentiable in `matrix`.

    The estimate is `u^T W v` for the unit vectors `u ~ W vector` and `v ~ W^T u`, whose gradient is
    that of the norm itself once `v` has converged. It is raised to `|W|_F / sqrt(min(m, n))`, a
    lower bound too, so that a cold vector cannot miss a large matrix. The gradient is that of the
    estimate.

    Args:
        matrix: Tensor `(..., m, n)`, or `ScaledMatrix` or `MatrixProduct` of tensors, `W`.
        vector: Tensor `(..., n)`, estimate of the right singular vector. Any vector that is not
            orthogonal to the leading one will do.

    Returns:
        A pair: the estimate `(...)` and the new vector `(..., n)`, through which no gradient flows.
        A fixed vector replaces one of zeros or NaN, given or found (for a zero matrix, say).
    """
    if isinstance(matrix, MatrixProduct):
        return _power_step_of_product(matrix, vector)
    if not isinstance(matrix, ScaledMatrix):
        matrix = ScaledMatrix(matrix)
    *batch, height, width = matrix.shape
    # Vectors are rows `(..., 1, n)`; a product may need a column.
    rows, columns = (_as_row(weights) for weights in (matrix.rows, matrix.columns))
    fixed, fixed_rows, fixed_columns = map(_fixed, (matrix.matrix, rows, columns))
    image = ops.matmul(fixed, _turned(_times(_as_row(vector), fixed_columns)))
    image = _times(_turned(image), fixed_rows)
    # Divided by a number of their size first, so that squares neither under- nor overflow.
    if matrix.frobenius is None:
        frobenius = _frobenius(fixed, fixed_rows, fixed_columns)
        size = ops.max(ops.abs(image), axis=-1, keepdims=True)
    else:
        frobenius = ops.stop_gradient(matrix.frobenius)
        # Out of range: no floor then.
        frobenius = ops.where(frobenius < np.inf, frobenius, ops.zeros_like(frobenius))
        size = ops.reshape(frobenius, (*batch, 1, 1))
    smallest = float(np.finfo(keras.backend.standardize_dtype(image.dtype)).tiny)
    size = ops.maximum(size, smallest)
    left, length, usable = _unit(image / size)
    # The next image is no shorter than this one, and not much longer: it is divided by this length.
    length = ops.where(usable, size * length, 1.0)
    image = _times(ops.matmul(_times(left, rows), matrix.matrix), columns)
    right, _, _ = _unit(ops.stop_gradient(image) / length)
    sigma = ops.reshape(ops.matmul(image, _turned(right)), tuple(batch))
    missing = ops.maximum(frobenius / math.sqrt(min(height, width)) - ops.stop_gradient(sigma), 0.0)
    return sigma + missing, ops.reshape(right, (*batch, width))


def _power_step_of_product(matrix, vector):
    """`power_step` of a `MatrixProduct`."""
    left, right = matrix.left, matrix.right
    fixed_left, fixed_right = map(_fixed, (left, right))
    heads, height, inner = left.shape
    rows = (1, heads * height) if matrix.stacked else (heads, 1, height)
    column = ops.matmul(fixed_right, ops.expand_dims(vector, -1))
    image = ops.reshape(ops.matmul(fixed_left, column), rows)
    # |A B|_F^2 is the sum of the entries of the products of A^T A and B B^T.
    turned = (ops.transpose(part, (0, 2, 1)) for part in (fixed_left, fixed_right))
    grams = ops.matmul(next(turned), fixed_left) * ops.matmul(fixed_right, next(turned))
    squares = ops.sum(grams, axis=(-2, -1), keepdims=True)
    if matrix.stacked:
        squares = ops.sum(squares, axis=0)
    # Rounded below zero or out of range: no floor then.
    in_range = ops.logical_and(squares > 0.0, squares < np.inf)
    frobenius = ops.sqrt(ops.where(in_range, squares, ops.ones_like(squares)))
    frobenius = ops.where(in_range, frobenius, ops.zeros_like(squares))
    smallest = float(np.finfo(keras.backend.standardize_dtype(image.dtype)).tiny)
    size = ops.maximum(ops.max(ops.abs(image), axis=-1, keepdims=True), smallest)
    unit, length, usable = _unit(image / size)
    length = ops.where(usable, size * length, 1.0)
    moved = ops.matmul(ops.matmul(ops.reshape(unit, (heads, 1, height)), left), right)
    if matrix.stacked:
        moved = ops.sum(moved, axis=0)
    found, _, _ = _unit(ops.stop_gradient(moved) / length)
    sigma = ops.matmul(moved, _turned(found))
    rank = min(matrix.shape[-2], matrix.shape[-1], inner * (heads if matrix.stacked else 1))
    # Products lose digits where they cancel: the floor stays a little below.
    floor = (1.0 - 1e-3) * frobenius / math.sqrt(rank)
    sigma = sigma + ops.maximum(floor - ops.stop_gradient(sigma), 0.0)
    shape = matrix.shape[:-2]
    return ops.reshape(sigma, shape), ops.reshape(found, (*shape, matrix.shape[-1]))


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
