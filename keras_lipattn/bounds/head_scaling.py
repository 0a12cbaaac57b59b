"""Scalings of the heads for Theorems 5.1, 5.2 and 7.3.

With `s_h = exp(x_h)` the logarithm of `||stack(C_h / s_h)|| ||[s_h B_h]||` is convex in `x`: each
factor is a supremum of logarithms of sums of exponentials. Its subgradient is the share of
each head in the top singular vector of the second factor minus that in the first. Subspace
iteration estimates both, averaged over nearby singular values, where the maximum has a kink.
An imprecise share makes the bound less tight but not wrong: the bound is evaluated with exact norms
at the scaling that is found.
"""

import math
import typing

import keras
import numpy as np
from keras import ops

from keras_lipattn.linalg import SAFETY, fast_operator_norm
from keras_lipattn.linalg.precision import SMALLEST_NORMAL

STEPS = 40
SUBSPACE = 8
# Weight `(lambda / lambda_1)^SHARPNESS` of an eigenvalue in the averaged shares.
SHARPNESS = 40.0
# Squares of float64 between this and its inverse have lost nothing.
_SMALL_SQUARE = 1e-250


def balancing_powers(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Powers of two that make the sizes of both kernels of a head equal, up to a factor of two.

    `(t B_h, C_h / t)` has the bounds of `(B_h, C_h)`. Without this, squares of a small kernel of
    one head are lost in sums with squares of a large kernel of another, for any products.

    Args:
        first: sizes of the first kernels, shape `(H,)`, not negative.
        second: those of the second ones.

    Returns:
        Integers of shape `(H,)`, for `numpy.ldexp` of the first kernels, and negated for the second
        ones; 0 for a head that is zero. Scaling by powers of two is exact.
    """
    used = (first > 0.0) & (second > 0.0)
    logs = [np.log2(np.where(used, size, 1.0)) for size in (first, second)]
    return np.rint(0.5 * (logs[1] - logs[0])).astype(int)


def scaled_back(unscaled: float, *sizes: float) -> tuple[float, str]:
    """A certified bound from that of matrices divided by their sizes.

    Args:
        unscaled: the bound for matrices whose entries have sizes of at most 1.
        *sizes: the numbers by which they were divided. The bound is linear in each.

    Returns:
        `(value, reason)`: `inf` with a reason where the product overflows.
    """
    value = SAFETY * unscaled
    for size in sizes:
        value *= size
    if not math.isfinite(value):
        return math.inf, "the bound is larger than the largest float64"
    # A bound that underflows is not 0.
    return (max(value, SMALLEST_NORMAL) if unscaled > 0.0 else value), ""


def frobenius_scaling(b: typing.Any, c: typing.Any, xp: typing.Any) -> typing.Any:
    """The scaling `s_h = sqrt(|C_h|_F / |B_h|_F)` of the heads.

    It minimizes the bound of Theorem 5.1 with Frobenius norms in place of operator norms. A
    head with a zero matrix gets 1: values and gradients are finite everywhere.

    Args:
        b: shape `(H, D, k)`.
        c: shape `(H, k, O)`.
        xp: array namespace, `numpy` or `keras.ops`.

    Returns:
        Shape `(H,)`, positive and finite.
    """
    return scaling_and_norms(b, c, xp)[0]


def scaling_and_norms(b: typing.Any, c: typing.Any, xp: typing.Any) -> tuple[typing.Any, ...]:
    """`frobenius_scaling`, and the Frobenius norms of all `B_h`, `(H,)`, and of all `C_h`.

    On TensorFlow the derivative of the scaling is written out, `-s_h / 2 B_h / |B_h|_F^2` and
    `s_h / 2 C_h / |C_h|_F^2`, which XLA compiles faster. Elsewhere forward mode must go through.
    """
    if xp is np or keras.backend.backend() != "tensorflow":
        return _scaling_and_norms(b, c, xp)[:3]

    @ops.custom_gradient
    def scaling(b, c):
        scale, of_b, of_c, usable = _scaling_and_norms(b, c, ops)

        def gradient(upstream, *_):
            half = 0.5 * ops.where(usable, upstream * scale, 0.0)

            def pulled_back(matrices, norms, sign):
                norms = ops.reshape(ops.where(usable, norms, 1.0), (-1, 1, 1))
                return ops.reshape(sign * half, (-1, 1, 1)) / norms * (matrices / norms)

            return pulled_back(b, of_b, -1.0), pulled_back(c, of_c, 1.0)

        return (scale, of_b, of_c), gradient

    found: typing.Any = scaling(b, c)
    scale, of_b, of_c = found
    return scale, ops.stop_gradient(of_b), ops.stop_gradient(of_c)


def _scaling_and_norms(b, c, xp):
    query_peak, query = _peaks_and_squares(b, xp)
    output_peak, output = _peaks_and_squares(c, xp)
    usable = xp.minimum(query, output) > 0.0
    # The inner `where` keeps 0/0 out of the gradient, the outer one out of the value.
    ratio = xp.where(usable, output, 1.0) / xp.where(usable, query, 1.0)
    peaks = xp.where(usable, output_peak / query_peak, 1.0)
    scale = xp.sqrt(peaks * xp.sqrt(ratio))
    return scale, query_peak * xp.sqrt(query), output_peak * xp.sqrt(output), usable


def polished_scaling(
    norm: str, b: np.ndarray, c: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, float]:
    """A scaling with a small bound, found from a first one.

    Args:
        norm: `"l2"` or `"token"`.
        b: float64, shape `(H, D, k)`.
        c: float64, shape `(H, k, O)`.
        start: positive, shape `(H,)`.

    Returns:
        `(scaling, estimate)`: a positive array of shape `(H,)`, and a lower estimate of the split
        bound at `start`. A bound at `scaling` below the estimate is below the bound at `start`.
    """
    # Relative to the first scaling, all heads have similar sizes, which fit float32.
    b, c = b * start[:, None, None], c / start[:, None, None]
    outputs = _Factor(c)
    queries = _Factor(np.swapaxes(b, 1, 2)) if norm == "l2" else _HeadNorms(b)
    best_value, best = np.inf, np.ones(len(start))
    logs = np.zeros(len(start))
    for step in range(STEPS):
        scale = np.exp(logs)
        query, query_shares = queries.norm(scale)
        output, output_shares = outputs.norm(1.0 / scale)
        # Estimates are low in the first half, where the vectors have not converged.
        if 2 * step >= STEPS and query * output < best_value:
            best_value, best = query * output, scale
        logs = logs - (query_shares - output_shares) / (1.0 + step / 6.0)
    estimate = 0.0
    for _ in range(4):
        estimate = queries.norm(np.ones(len(start)))[0] * outputs.norm(np.ones(len(start)))[0]
    return best * start, estimate


class _Factor:
    """`|| stack(weight_h A_h) ||` for blocks `A_h` of shape `(k, m)`."""

    def __init__(self, blocks: np.ndarray) -> None:
        heads, self.rows, columns = blocks.shape
        stacked = blocks.reshape(heads * self.rows, columns)
        # With entries of size 1 the squares in the Gram matrix neither overflow nor underflow.
        # Float32 is enough for estimates.
        self.size = max(float(np.abs(stacked).max()), SMALLEST_NORMAL)
        stacked = (stacked / self.size).astype(np.float32)
        self.gram = stacked @ stacked.T
        shape = len(stacked), min(SUBSPACE, len(stacked))
        basis = np.random.default_rng(0).normal(size=shape)
        self.basis = np.linalg.qr(basis.astype(np.float32))[0]

    def norm(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """A lower estimate of the norm, and the heads' shares in its square."""
        rows = np.repeat(weights.astype(np.float32), self.rows)[:, None]
        image = rows * (self.gram @ (rows * self.basis))
        values, turn = np.linalg.eigh((self.basis.T @ image).astype(np.float64))
        top = max(values[-1], SMALLEST_NORMAL)
        weight = (np.maximum(values, 0.0) / top) ** SHARPNESS
        shares = np.square(self.basis @ turn) @ weight
        shares = shares.reshape(-1, self.rows).sum(axis=1)
        self.basis = np.linalg.qr(image)[0]
        return self.size * np.sqrt(top), shares / max(shares.sum(), SMALLEST_NORMAL)


class _HeadNorms:
    """`sqrt(sum_h weight_h^2 ||B_h||^2)`."""

    def __init__(self, b: np.ndarray) -> None:
        self.norms = fast_operator_norm(b)

    def norm(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The norm, and the heads' shares in its square."""
        heads = weights * self.norms
        total = max(float(np.linalg.norm(heads)), SMALLEST_NORMAL)
        return total, np.square(heads / total)


def _peaks_and_squares(matrices, xp):
    """Largest absolute entry of every head's matrix, and the sum of squares relative to it.

    Both `(H,)`. A float32 square overflows at 1e19 already.
    """
    if xp is np:
        squares = np.einsum("hij,hij->h", matrices, matrices)
        if squares.size and _SMALL_SQUARE < squares.min() and squares.max() < 1.0 / _SMALL_SQUARE:
            return np.ones_like(squares), squares
    peak = xp.max(xp.abs(matrices), axis=(1, 2))
    peak = xp.where(peak > 0.0, peak, 1.0)
    if xp is not np:
        # The Frobenius norm does not depend on it.
        peak = xp.stop_gradient(peak)
    return peak, xp.sum(xp.square(matrices / xp.reshape(peak, (-1, 1, 1))), axis=(1, 2))
