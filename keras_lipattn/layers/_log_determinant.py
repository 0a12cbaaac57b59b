"""Log-determinants of `I + J` for a contraction with Jacobian `J`: exact, truncated, and sampled.

`log det(I + J) = sum_k (-1)^(k+1) / k tr(J^k)`, where every trace is a mean of `v^T J^k v` over
probes `v` with `E[v v^T] = I`. Only products with `J^T` are used.

Reference:
    Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", ICML 2019 (the
    series); Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative
    modeling", NeurIPS 2019 (Russian roulette, and the gradient in constant memory).
"""

import math

import keras
from keras import ops

from keras_lipattn.layers._vector_jacobian import vector_jacobian


def exact_log_determinant(branch, x):
    """`log det(I + J)` from the full Jacobian, `(B,)`: memory and time for all its columns.

    Args:
        branch: Function that takes a number of copies and returns a function of a tensor
            `(copies * B, ...)`, which works example by example.
        x: Tensor `(B, ...)` whose axes but the first are static.
    """
    size = math.prod(x.shape[1:])
    rows = vector_jacobian(branch(size), _repeat(x, size), _basis(x, size))
    jacobian = ops.reshape(rows, (size, -1, size))
    matrix = ops.transpose(jacobian, (1, 0, 2)) + ops.eye(size, dtype=x.dtype)
    # A contraction leaves the determinant positive: its sign needs no look.
    return ops.slogdet(matrix)[1]


def series_log_determinant(branch, x, *, num_terms, probes=None):
    """The first terms of the series, `(B,)`.

    Args:
        branch: See `exact_log_determinant`.
        x: Tensor `(B, ...)`.
        num_terms: Number of terms.
        probes: Tensor `(S, B, ...)`, or `None` for the exact traces, which cost as many probes as
            `x[0]` has entries and need its axes static.
    """
    count = math.prod(x.shape[1:]) if probes is None else probes.shape[0]
    flat = _basis(x, count) if probes is None else _merge(probes)
    points = _repeat(x, count)
    terms = _power_series(
        branch(count), points, flat, num_terms, lambda index: ops.cast(index <= num_terms, x.dtype)
    )
    total = ops.sum(ops.reshape(terms, (count, -1)), axis=0)
    return total if probes is None else total / count


def roulette_log_determinant(branch, x, probes, *, sure_terms, continuation, uniform):
    """An unbiased estimate, `(B,)`: a random number of terms, later ones weighted up.

    After `sure_terms` terms every further one is computed with probability `continuation`, and
    divided by the probability that it is. The variance is finite when `continuation` exceeds the
    square of the contraction of `J`.

    Args:
        branch: See `exact_log_determinant`.
        x: Tensor `(B, ...)`.
        probes: Tensor `(S, B, ...)`.
        sure_terms: Number of terms always computed, at least 1.
        continuation: Probability in (0, 1) to go on after each further term.
        uniform: Random numbers in [0, 1), `(S,)`. The examples of a batch share the number of
            terms: the loop would run for the longest anyway.
    """
    count = probes.shape[0]
    points, flat = _repeat(x, count), _merge(probes)
    log_continuation = math.log(continuation)
    extra = ops.cast(ops.floor(ops.log1p(-uniform) / log_continuation), "int32")
    last = ops.repeat(sure_terms + extra, ops.shape(x)[0])

    def weight(index):
        beyond = ops.cast(ops.maximum(index - sure_terms, 0), x.dtype)
        return ops.where(index <= last, ops.exp(-beyond * log_continuation), 0.0)

    terms = _power_series(branch(count), points, flat, ops.max(last), weight)
    return ops.mean(ops.reshape(terms, (count, -1)), axis=0)


def truncation_error(size, contraction, num_terms):
    """Largest possible sum of the terms after the first `num_terms`.

    The eigenvalues of `J` are at most `contraction` in size, so `|tr(J^k)| <= size contraction^k`.

    Args:
        size: Dimension, the number of rows of `J` which are not zero; a number or a tensor.
        contraction: Lipschitz constant in any norm.
        num_terms: Number of terms that are kept.
    """
    following = num_terms + 1
    return size * (contraction**following / (following * (1.0 - contraction)))


def terms_for(size, contraction, tolerance):
    """The smallest number of terms whose truncation error is at most `tolerance`."""
    count = 1
    while truncation_error(size, contraction, count) > tolerance:
        count += 1
    return count


def rademacher(shape, dtype, seed):
    """Probes of entries `+1` and `-1`, whose squares have no variance."""
    signs = keras.random.randint(shape, 0, 2, seed=seed)
    return ops.cast(2 * signs - 1, dtype)


def _power_series(branch, x, probe, last, weight):
    """`sum_(k <= last) (-1)^(k+1) weight(k) / k  probe^T J^k probe`, `(B,)`.

    The powers are computed without a record. The derivative of the sum is, in expectation over
    probes, `<w, dJ probe>` with `w = sum_k (-1)^(k+1) weight(k) (J^T)^(k-1) probe`: one product
    with `J` that is recorded, whatever the number of terms.
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
    """All unit vectors for every example: `(size * B, ...)`."""
    unit = ops.reshape(ops.eye(size, dtype=x.dtype), (size, 1, *x.shape[1:]))
    return _merge(unit * ops.ones_like(x)[None])


def _repeat(x, count):
    """`count` copies of a batch, one after the other: `(count * B, ...)`."""
    return ops.concatenate([x] * count, axis=0) if count > 1 else x


def _merge(tensor):
    """`(S, B, ...)` as `(S * B, ...)`."""
    return ops.reshape(tensor, (-1, *ops.shape(tensor)[2:]))
