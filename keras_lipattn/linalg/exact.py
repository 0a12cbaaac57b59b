"""Operator norms on the host, exact up to float64 rounding."""

import typing

import numpy as np
import numpy.typing as npt

# Rounding allowance of every certified number: a float64 decomposition of a matrix with
# sides in the thousands is low by far less than one part in 10^9.
SAFETY = 1.0 + 1e-9


def operator_norm(matrix: npt.ArrayLike) -> typing.Any:
    """Largest singular value, computed in float64 on the host.

    Args:
        matrix: array-like of shape `(rows, columns)`, or a batch of matrices of shape
            `(..., rows, columns)`. Any real dtype; it is cast to float64 first, because a
            decomposition in float32 can be low by 2e-7.

    Returns:
        A float for one matrix, a float64 array of shape `(...)` for a batch. Matrices
        without entries have norm 0. A matrix with a NaN or infinite entry has norm `inf`.

    Raises:
        ValueError: if `matrix` has fewer than two axes.

    Example:

    >>> operator_norm([[3.0, 0.0], [0.0, -4.0]])
    4.0
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim < 2:
        raise ValueError(
            "`matrix` must have at least two axes, `(..., rows, columns)`. "
            f"Received: shape={matrix.shape}"
        )
    batch = matrix.shape[:-2]
    if matrix.size == 0:
        return np.zeros(batch) if batch else 0.0
    finite = np.asarray(np.isfinite(matrix).all(axis=(-2, -1)))
    # A placeholder for matrices that the decomposition would reject.
    matrix = np.where(finite[..., None, None], matrix, 0.0)
    # Scaled to entries of size 1, so that squares neither overflow nor vanish.
    scale = np.abs(matrix).max(axis=(-2, -1))
    scaled = matrix / np.where(scale > 0.0, scale, 1.0)[..., None, None]
    norms = np.where(finite, np.linalg.norm(scaled, 2, axis=(-2, -1)) * scale, np.inf)
    return norms if batch else float(norms)
