"""Log-determinants of `I + J`, where `J` is the Jacobian of a contraction.

`log det(I + J) = sum_k (-1)^(k+1) / k tr(J^k)`, where every trace is a mean of `v^T J^k v` over
probe vectors `v` with `E[v v^T] = I`. Only products with `J^T` are needed.

Reference:
    Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", ICML 2019 (the
    series); Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative
    modeling", NeurIPS 2019 (Russian roulette, and the gradient in constant memory).
"""

import math

import keras
from keras import ops

from keras_lipattn.layers._autodiff import vector_jacobian


def exact_log_determinant(branch, x):
    """`log det(I + J)` from the full Jacobian, `(B,)`.

    Args:
        branch: Function that takes a number of copies of the batch and returns the contraction as a
            function of a tensor `(copies * B, ...)`.
        x: Tensor `(B, ...)`. All axes except the first are static.
    """
    size = math.prod(x.shape[1:])
    rows = vector_jacobian(branch(size), _repeat(x, size), _basis(x, size))
    jacobian = ops.reshape(rows, (size, -1, size))
    matrix = ops.transpose(jacobian, (1, 0, 2)) + ops.eye(size, dtype=x.dtype)
    # The determinant of `I + J` is positive because `J` contracts.
    return ops.slogdet(matrix)[1]


def series_log_determinant(branch, x, *, num_terms, probes=None):
    """Sum of the first terms of the series, `(B,)`.

    Args:
        branch: See `exact_log_determinant`.
        x: Tensor `(B, ...)`.
        num_terms: Number of terms.
        probes: Probe vectors `(S, B, ...)`, or `None` for exact traces. Those take one probe for
            each entry of `x[0]`, and all axes of `x` except the first must be static.
    """
    count = math.prod(x.shape[1:]) if probes is None else probes.shape[0]
    flat = _basis(x, count) if probes is None else _merge(probes)
    points = _repeat(x, count)
    terms = _power_series(
        branch(count), points, flat, num_terms, lambda index: ops.cast(index <= num_terms, x.dtype)
    )
    total = ops.sum(ops.reshape(terms, (count, -1)), axis=0)
    return total if probes is None else total / count


def roulette_log_determinant(branch, x, probes, *, min_terms, continuation, uniform):
    """Unbiased estimate from a random number of terms (Russian roulette), `(B,)`.

    The first `min_terms` terms are always computed. After each further term, the sum continues
    with probability `continuation`. Each term is divided by the probability that it is computed.
    The variance is finite if `continuation` exceeds the square of the constant of the contraction.

    Args:
        branch: See `exact_log_determinant`.
        x: Tensor `(B, ...)`.
        probes: Probe vectors `(S, B, ...)`.
        min_terms: Number of terms that are always computed, at least 1.
        continuation: Probability in (0, 1) of computing one more term.
        uniform: Random numbers in [0, 1), `(S,)`. All examples of a batch have the same number of
            terms, since the loop runs until the longest sum is complete.
    """
    count = probes.shape[0]
    points, flat = _repeat(x, count), _merge(probes)
    log_continuation = math.log(continuation)
    extra = ops.cast(ops.floor(ops.log1p(-uniform) / log_continuation), "int32")
    last = ops.repeat(min_terms + extra, ops.shape(x)[0])

    def weight(index):
        beyond = ops.cast(ops.maximum(index - min_terms, 0), x.dtype)
        return ops.where(index <= last, ops.exp(-beyond * log_continuation), 0.0)

    terms = _power_series(branch(count), points, flat, ops.max(last), weight)
    return ops.mean(ops.reshape(terms, (count, -1)), axis=0)


def truncation_error(size, contraction, num_terms):
    """Upper bound of the sum of all terms after the first `num_terms`.

    The eigenvalues of `J` have modulus at most `contraction`, so
    `|tr(J^k)| <= size * contraction^k`.

    Args:
        size: Number of rows of `J` that are not zero; a number or a tensor.
        contraction: Lipschitz constant of the contraction in any norm.
        num_terms: Number of terms that are kept.
    """
    following = num_terms + 1
    return size * (contraction**following / (following * (1.0 - contraction)))


def valid_entries(x, mask):
    """Number of entries of each example that are not padding, `(B,)`.

    Args:
        x: Tensor `(B, ..., D)`.
        mask: Boolean `(B, ...)`, false where a token is padding, or `None`.
    """
    shape = ops.shape(x)
    if mask is None:
        return ops.full((shape[0],), math.prod(shape[1:]), dtype=x.dtype)
    axes = tuple(range(1, len(mask.shape)))
    return shape[-1] * ops.sum(ops.cast(mask, x.dtype), axis=axes)


def terms_for(size, contraction, tolerance):
    """Smallest number of terms with a truncation error of at most `tolerance`."""
    count = 1
    while truncation_error(size, contraction, count) > tolerance:
        count += 1
    return count


def rademacher(shape, dtype, seed):
    """Random probe vectors with entries `+1` and `-1`."""
    signs = keras.random.randint(shape, 0, 2, seed=seed)
    return ops.cast(2 * signs - 1, dtype)


def _power_series(branch, x, probe, last, weight):
    """`sum_(k <= last) (-1)^(k+1) weight(k) / k  probe^T J^k probe`, `(B,)`.

    The loop over the powers is not recorded for differentiation. In expectation over probes, the
    derivative of the sum is `<w, dJ probe>` with
    `w = sum_k (-1)^(k+1) weight(k) (J^T)^(k-1) probe`. So one recorded product with `J` is enough
    for any number of terms.
    """
    fixed, probe = ops.stop_gradient(x), ops.stop_gradient(probe)
    axes = tuple(range(1, len(x.shape)))
    rank = (-1,) + (1,) * len(axes)

    def body(index, power, total, adjoint):
        signed = weight(index) * (1.0 - 2.0 * ops.cast(ops.equal(index % 2, 0), x.dtype))
        adjoint = adjoint + ops.reshape(signed, rank) * power
        power = vector_jacobian(branch, fixed, power, differentiable=False)
        power = ops.stop_gradient(power)
        trace = ops.sum(power * probe, axis=axes)
        total = total + signed / ops.cast(index, x.dtype) * trace
        return index + 1, power, total, adjoint

    start = (
        ops.ones((), "int32"),
        probe,
        ops.sum(ops.zeros_like(probe), axis=axes),
        ops.zeros_like(probe),
    )
    _, _, total, adjoint = ops.while_loop(lambda index, *_: index <= last, body, start)
    total, adjoint = ops.stop_gradient(total), ops.stop_gradient(adjoint)
    recorded = ops.sum(vector_jacobian(branch, x, adjoint) * probe, axis=axes)
    return total + (recorded - ops.stop_gradient(recorded))


def _basis(x, size):
    """All unit vectors for each example: `(size * B, ...)`."""
    unit = ops.reshape(ops.eye(size, dtype=x.dtype), (size, 1, *x.shape[1:]))
    return _merge(unit * ops.ones_like(x)[None])


def _repeat(x, count):
    """Concatenation of `count` copies of a batch: `(count * B, ...)`."""
    return ops.concatenate([x] * count, axis=0) if count > 1 else x


def _merge(tensor):
    """Reshape `(S, B, ...)` to `(S * B, ...)`."""
    return ops.reshape(tensor, (-1, *ops.shape(tensor)[2:]))
