"""The operator norm of a convolution with strides, from its symbol at a grid of frequencies.

On an infinite grid, a convolution with kernel `K` and stride `s` is a multiplication with a matrix
at each frequency `t`, its symbol: the sum of `exp(i a t) K_a` over the offsets `a` of the kernel
that fall on one position within a stride, side by side for all positions. Zero padding, of any
kind or none, restricts the rows and columns of the operator, which does not enlarge its norm.

In each axis the symbol has `q = ceil(k / s)` offsets. For unit vectors `u` and `v` the real part of
`u* symbol v` is an entire function of exponential type `(q - 1) / 2`, up to a phase. One that is
largest in modulus at `t0`, with the value `m`, is at least `m cos((q - 1) / 2 |t - t0|)` nearby
(Duffin and Schaeffer; for polynomials M. Riesz). The next of `n` equispaced frequencies is at most
`pi / n` away, so the largest norm at these is at least `cos((q - 1) pi / (2 n))` times the norm.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Frequencies in an axis, for each offset of the symbol after the first.
CAP_GRID = 8
_FINE_GRID = 24


def grid_points(sizes: Sequence[int], strides: Sequence[int], density: int) -> list[int]:
    """Number of frequencies for each axis: one if the symbol is constant along it."""
    return [max(1, density * (-(-k // s) - 1)) for k, s in zip(sizes, strides, strict=True)]


def grid_slack(sizes: Sequence[int], strides: Sequence[int], density: int) -> float:
    """Upper bound of the norm over the largest norm at the frequencies of the grid."""
    points = grid_points(sizes, strides, density)
    return math.prod(
        1.0 / math.cos((-(-k // s) - 1) * math.pi / (2 * n))
        for k, s, n in zip(sizes, strides, points, strict=True)
    )


def symbol(kernel, strides: Sequence[int], density: int, xp):
    """The symbol at the frequencies of a grid, as real matrices.

    The symbol at `-t` is the conjugate of that at `t`, so half of the frequencies suffice.

    Args:
        kernel: `(k_1, ..., k_r, in, out)`.
        strides: Stride of each axis.
        density: See `grid_points`.
        xp: Array namespace, `numpy` or `keras.ops`.

    Returns:
        Matrices `(F, 2 P in, 2 out)` with the singular values of the symbol, each twice, where `P`
        is the number of positions within a stride.
    """
    *sizes, depth, out = kernel.shape
    waves, positions = _waves(tuple(sizes), tuple(strides), density)
    flat = xp.reshape(kernel, (len(positions), depth * out))
    # Offsets by position; a position without one of them gets zeros.
    parts = []
    for part in (waves.real, waves.imag):
        weights = np.stack([part * (positions == p) for p in range(positions.max() + 1)], axis=1)
        weights = weights.reshape(-1, len(positions)).astype(_dtype(kernel))
        parts.append(xp.reshape(xp.matmul(weights, flat), (len(waves), -1, out)))
    real, imaginary = parts
    return xp.concatenate(
        [
            xp.concatenate([real, -imaginary], axis=-1),
            xp.concatenate([imaginary, real], axis=-1),
        ],
        axis=-2,
    )


def symbol_shape(shape: Sequence[int], strides: Sequence[int], density: int) -> tuple[int, ...]:
    """Shape of the result of `symbol` for a kernel of this shape."""
    *sizes, depth, out = shape
    waves, positions = _waves(tuple(sizes), tuple(strides), density)
    return len(waves), 2 * (int(positions.max()) + 1) * depth, 2 * out


def symbol_norm(
    kernel: np.ndarray, strides: Sequence[int], max_work: float, density: int = _FINE_GRID
) -> float:
    """Upper bound of the norm of the convolution in the 2-norm, on the host, up to roundings.

    Args:
        kernel: Float64 array `(k_1, ..., k_r, in, out)`.
        strides: Stride of each axis.
        max_work: More multiplications than this are not done.
        density: See `grid_points`.

    Returns:
        A float, `inf` if it needs more than `max_work` multiplications.
    """
    sizes = kernel.shape[:-2]
    count, rows, columns = symbol_shape(kernel.shape, strides, density)
    if count * rows * columns * min(rows, columns) > max_work:
        return math.inf
    norms = np.linalg.norm(symbol(kernel, strides, density, np), 2, axis=(-2, -1))
    return float(norms.max()) * grid_slack(sizes, strides, density)


def _waves(sizes: tuple[int, ...], strides: tuple[int, ...], density: int) -> tuple[Any, Any]:
    """`exp(i a t)` by frequency and offset, and the position of each offset within a stride."""
    points = grid_points(sizes, strides, density)
    frequencies = np.stack(
        np.meshgrid(*[np.arange(n) for n in points], indexing="ij"), axis=-1
    ).reshape(-1, len(sizes))
    opposite = np.ravel_multi_index(((-frequencies) % points).T, points)
    frequencies = frequencies[np.arange(len(frequencies)) <= opposite]
    offsets = np.stack(np.meshgrid(*[np.arange(k) for k in sizes], indexing="ij"), axis=-1).reshape(
        -1, len(sizes)
    )
    angles = (2.0 * np.pi * frequencies / points) @ (offsets // strides).T
    within = [min(k, s) for k, s in zip(sizes, strides, strict=True)]
    positions = np.ravel_multi_index((offsets % strides).T, within)
    return np.exp(1j * angles), positions


def _dtype(array) -> str:
    # PyTorch's have no name, but print as `torch.float32`.
    return str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]
