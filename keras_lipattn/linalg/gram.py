"""Upper bound of an operator norm by Gram iteration: matrix products only, for use in a graph."""

from keras import ops

from keras_lipattn.linalg.precision import product_allowance, roundoff

NUM_SQUARINGS = 10
# Far below the rounding of float32, so that a cap does not depend on how its norm was computed.
CONVERGED = 3e-8


def gram_upper_bound(matrix, *, num_squarings=NUM_SQUARINGS):
    """Returns an upper bound of the spectral norm of `matrix`, computed with matrix products.

    With `G_0 = W^T W / |W|_F^2` (or `W W^T`, whichever is smaller) and
    `G_{k+1} = (G_k / |G_k|_F)^2`, `||G_k|| <= |G_k|_F` holds at every step, and every squaring
    halves the relative slack: in exact arithmetic the value is at most
    `d**(2**-(num_squarings + 2))` times the norm, with `d` the smaller side.

    Rounding is accounted for step by step. A computed product of `d x d` matrices differs from the
    exact one by at most `gamma |A|_F |B|_F` in Frobenius norm, `gamma = d u / (1 - d u)`, so
    `||A||^2 <= ||fl(A^2)|| + gamma` for `|A|_F = 1`. The allowance is `gamma` with the roundoff of
    the device: products of float32 matrices lose more on devices that round their factors first.

    Args:
        matrix: Tensor `(..., m, n)`, float32 or float64.
        num_squarings: Number of squarings. More are tighter and cost `d**3` operations each.

    Returns:
        Tensor `(...)`, at least the spectral norm of each matrix. Not finite where `matrix` is not.

    Reference:
        Delattre, Barthelemy, Araujo, Allauzen, "Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration", 2023.
    """
    side, summed = sorted(matrix.shape[-2:])
    peak, frobenius, power = _scaled_gram(matrix)
    radii = [_frobenius(power)]
    for _ in range(num_squarings):
        unit = power / radii[-1]
        power = ops.matmul(unit, unit)
        radii.append(_frobenius(power))
    bound = radii[-1]
    squaring_allowance = product_allowance(side, matrix.dtype)
    for radius in reversed(radii[:-1]):
        bound = radius * ops.sqrt(bound + squaring_allowance)
    bound = frobenius * ops.sqrt(bound + product_allowance(summed, matrix.dtype))
    # A few elementwise roundings (scaling, square roots) remain outside the products.
    slack = 1.0 + 16 * (num_squarings + 2) * roundoff(matrix.dtype)
    return ops.squeeze(peak * bound, axis=(-2, -1)) * slack


def converged_upper_bound(matrix, *, tolerance=CONVERGED):
    """`gram_upper_bound` in float64, squared until the bound has converged.

    With `p_k = |G_k|_F` the bound of `||G_0||` is the product of the `p_k**(2**-k)`. After `n`
    squarings `||G_n|| >= p_n**2`, so the norm is overestimated by `p_n**-(2**-(n + 1))` at most.
    Rounding of the products adds `d` times their allowance in total, since `||G_k|| >= 1 / d`.

    Args:
        matrix: Tensor `(..., m, n)` of float64.
        tolerance: Largest relative excess over the norm, in exact arithmetic.

    Returns:
        Tensor `(...)`, as `gram_upper_bound` returns it. No gradient flows through it.
    """
    side, summed = sorted(matrix.shape[-2:])
    peak, frobenius, power = (ops.stop_gradient(part) for part in _scaled_gram(matrix))

    def excess(radius, exponent):
        return ops.max(-ops.log(radius)) * exponent / 2.0

    def unconverged(power, radius, log_bound, exponent):
        # A comparison with NaN is false.
        return excess(radius, exponent) > tolerance

    def square(power, radius, log_bound, exponent):
        unit = power / radius
        power, exponent = ops.matmul(unit, unit), exponent / 2.0
        radius = _frobenius(power)
        return power, radius, log_bound + exponent * ops.log(radius), exponent

    radius = _frobenius(power)
    start = (power, radius, ops.log(radius), ops.ones((), matrix.dtype))
    _, _, log_bound, _ = ops.while_loop(unconverged, square, start)
    rounding = 2.0 * side * product_allowance(side, matrix.dtype)
    bound = ops.exp(log_bound) * (1.0 + rounding) + product_allowance(summed, matrix.dtype)
    # The excess halves with every squaring, so there are fewer than 64 of them.
    slack = 1.0 + 16 * 64 * roundoff(matrix.dtype)
    return ops.squeeze(peak * frobenius * ops.sqrt(bound), axis=(-2, -1)) * slack


def _scaled_gram(matrix):
    """Largest entry, Frobenius norm after division by it, and the normalized Gram matrix."""
    # Dividing by the largest entry keeps the squares from under- or overflowing. A zero matrix is
    # replaced by ones, so that no divisor below is zero; the bound is multiplied by the largest
    # entry, 0. No gradient needs to flow through that entry: the bound does not depend on it.
    rows, cols = matrix.shape[-2:]
    peak = ops.stop_gradient(ops.max(ops.abs(matrix), axis=(-2, -1), keepdims=True))
    usable = peak > 0
    scaled = ops.where(usable, matrix / ops.where(usable, peak, 1.0), 1.0)
    frobenius = _frobenius(scaled)
    scaled = scaled / frobenius
    transposed = ops.swapaxes(scaled, -1, -2)
    power = ops.matmul(transposed, scaled) if cols <= rows else ops.matmul(scaled, transposed)
    return peak, frobenius, power


def _frobenius(matrix):
    return ops.sqrt(ops.sum(ops.square(matrix), axis=(-2, -1), keepdims=True))
