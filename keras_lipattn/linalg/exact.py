"""Operator norms on the host, exact up to float64 rounding."""

import typing

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas, eigh_tridiagonal, lapack

from keras_lipattn.linalg.precision import SMALLEST_NORMAL, UNIT_ROUNDOFF

# Rounding allowance of every certified number: a float64 decomposition of a matrix with
# sides in the thousands is low by far less than one part in 10^9.
SAFETY = 1.0 + 1e-9
# From this longer side on, the Gram matrix is several times faster than a decomposition.
GRAM_SIDE = 128
_ROUNDOFF = UNIT_ROUNDOFF["float64"]
# Squares of entries of this size stay far from the limits of float64.
_LARGEST_EXPONENT = 100
# Excess of a proved eigenvalue, relative to an estimate from below.
_MARGIN = 1.5e-9
# Lanczos iteration: precision of the estimate, limit, steps between two tests, relative length of a
# residual that is zero. Estimates of equal matrices rounded differently must agree.
_PRECISION = 1e-11
_MOST_STEPS = 200
_STEPS_AT_ONCE = 16
_ENDED = 1e-14


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

    >>> keras_lipattn.linalg.operator_norm([[3.0, 0.0], [0.0, -4.0]])
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


def fast_operator_norm(matrix: np.ndarray) -> typing.Any:
    """`operator_norm`; that of large matrices by a Gram matrix, hence up to 2e-9 above it."""
    if matrix.size and max(matrix.shape[-2:]) >= GRAM_SIDE:
        size = np.maximum(matrix.max(axis=(-2, -1)), -matrix.min(axis=(-2, -1)))
        if np.isfinite(size).all():
            return _gram_norm(matrix, size)
    return operator_norm(matrix)


def _gram_norm(matrix: np.ndarray, size: typing.Any) -> typing.Any:
    """An upper bound of the spectral norm by the Gram matrix of the smaller side, in float64.

    With `m` terms per entry the computed Gram matrix `G` is off by at most
    `m u / (1 - m u) || |W| |W|^T || <= 1.01 m u trace(G)` in norm. `_largest_eigenvalue` bounds the
    largest eigenvalue of `G`. What underflows is far below `u trace(G)`, since the largest entry
    of `W` is at least `2^-100`.

    Args:
        matrix: float64, finite, not empty, shape `(rows, columns)`, or a batch
            `(..., rows, columns)`.
        size: largest absolute entry of each matrix, shape `(...)`.

    Returns:
        A float for one matrix, a float64 array of shape `(...)` for a batch.
    """
    batch = matrix.shape[:-2]
    exponents = np.frexp(size)[1]
    if np.abs(exponents).max() > _LARGEST_EXPONENT:
        # Powers of two scale without rounding, but for what underflows.
        matrix = np.ldexp(matrix, -exponents[..., None, None])
    else:
        exponents = np.zeros_like(exponents)
    summed, side = max(matrix.shape[-2:]), min(matrix.shape[-2:])
    if side >= GRAM_SIDE:
        squares = np.array([_square(one, summed) for one in matrix.reshape(-1, *matrix.shape[-2:])])
        squares = squares.reshape(batch)
    else:
        turned = np.swapaxes(matrix, -2, -1)
        gram = turned @ matrix if matrix.shape[-2] > side else matrix @ turned
        squares = _all_eigenvalues(gram) + _gram_rounding(gram, summed)
    norms = np.ldexp(SAFETY * np.sqrt(squares), exponents)
    # Subnormal numbers are rounded by more than the allowance.
    norms = np.where((norms > 0.0) & (norms < SMALLEST_NORMAL), np.nextafter(norms, np.inf), norms)
    return norms if batch else float(norms)


def _square(matrix: np.ndarray, summed: int) -> float:
    """Upper bound of the square of the norm of one matrix."""
    # BLAS reads columns first, hence transposes of arrays that have rows first. Only the lower
    # triangle is computed.
    by_rows = matrix.flags.c_contiguous
    wide = matrix.shape[1] == summed
    gram = blas.dsyrk(1.0, matrix.T if by_rows else matrix, trans=int(by_rows == wide), lower=1)
    return _largest_eigenvalue(gram) + _gram_rounding(gram, summed)


def _gram_rounding(gram: np.ndarray, summed: int) -> typing.Any:
    return 1.01 * summed * _ROUNDOFF * np.trace(gram, axis1=-2, axis2=-1)


def _largest_eigenvalue(gram: np.ndarray) -> float:
    """Upper bound of the largest eigenvalue, proved by one Cholesky factorization.

    Args:
        gram: a computed Gram matrix `(n, n)` in column-major order. Only the lower triangle is
            used.

    If the factorization of `H = fl(mu I - G)` runs to completion in floating-point arithmetic,
    in any order of the sums, then `lambda_min(H) >= -gamma / (1 - gamma) trace(H)` with
    `gamma = (n + 1) u / (1 - (n + 1) u)`. With `trace(H) <= n mu` and a rounding of at most `u mu`
    in each entry of the diagonal of `H`, `lambda_max(G) <= (1 + 2 n (n + 2) u) mu`. The factor 2
    also covers implementations that multiply by a rounded reciprocal of the pivot. What
    underflows is far below `u mu`. `mu` is an estimate from below, enlarged by `_MARGIN`.

    Reference:
        Rump, "Verification of positive definiteness", BIT 46, 2006, Theorem 2.3.
    """
    side = len(gram)
    estimate = _eigenvalue_estimate(gram)
    shift = (1.0 + _MARGIN) * estimate
    if estimate > 0.0 and side < 1e6:
        shifted = np.negative(gram)
        shifted[np.diag_indices(side)] += shift
        factor, failed = lapack.dpotrf(shifted, lower=1, clean=0, overwrite_a=1)
        # Not every implementation reports a NaN. An infinite entry leaves a pivot that is not
        # finite.
        pivots = np.diagonal(factor)
        if failed == 0 and pivots.min() > 0.0 and np.isfinite(pivots).all():
            return (1.0 + 2.0 * side * (side + 2) * _ROUNDOFF) * shift
    return float(_all_eigenvalues(gram))


def _all_eigenvalues(gram: np.ndarray) -> typing.Any:
    """Upper bounds of the largest eigenvalues, from all of them.

    A backward stable solver is off by a multiple of `u` times the norm, bounded here by `10 n u`
    times the trace.
    """
    trace = np.trace(gram, axis1=-2, axis2=-1)
    return np.linalg.eigvalsh(gram)[..., -1] + 10.0 * gram.shape[-1] * _ROUNDOFF * trace


def _eigenvalue_estimate(gram: np.ndarray) -> float:
    """Estimate of the largest eigenvalue by the Lanczos iteration, nearly always from below.

    `r^2 / gap`, with the residual `r` and the gap to the next Ritz value, estimates its error.
    """
    vector = np.random.default_rng(0).standard_normal(len(gram))
    vector /= np.linalg.norm(vector)
    before, length = np.zeros_like(vector), 0.0
    diagonal: list[float] = []
    lengths: list[float] = []
    value = 0.0
    for step in range(1, min(len(gram), _MOST_STEPS) + 1):
        image = blas.dsymv(1.0, gram, vector, lower=1)
        diagonal.append(float(image @ vector))
        image -= diagonal[-1] * vector
        image -= length * before
        length = float(np.linalg.norm(image))
        ended = length <= _ENDED * max(diagonal)
        if ended or step % _STEPS_AT_ONCE == 0:
            try:
                values, vectors = eigh_tridiagonal(diagonal, lengths, check_finite=False)
            except np.linalg.LinAlgError:
                # LAPACK of older releases of scipy. What is not an estimate fails the proof.
                break
            value = float(values[-1])
            residual = length * abs(float(vectors[-1, -1]))
            if ended or residual**2 <= _PRECISION * value * (value - values[-2]):
                break
        lengths.append(length)
        before, vector = vector, image / length
    return value
