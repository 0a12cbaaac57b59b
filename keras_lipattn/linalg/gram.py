"""Upper bound of an operator norm by Gram iteration: matrix products only, for use in a graph."""

import math

import keras
from keras import ops

NUM_SQUARINGS = 10
# Far below the roundings of float32, so that a cap is the same however its norm was found.
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
    the device: products of float32 matrices lose more on devices which round their factors first.

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
    slack = 1.0 + 16 * (num_squarings + 2) * _roundoff(matrix.dtype)
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
    slack = 1.0 + 16 * 64 * _roundoff(matrix.dtype)
    return ops.squeeze(peak * frobenius * ops.sqrt(bound), axis=(-2, -1)) * slack


def _scaled_gram(matrix):
    """Largest entry, Frobenius norm once divided by it, and the smaller Gram matrix of the rest."""
    # The largest entry goes first, so that the squares neither under- nor overflow. A matrix of
    # ones stands in for zero: nothing below is zero then, and the bound, times the largest entry,
    # is. No gradient need flow through that entry: what is divided by it is multiplied with it.
    rows, cols = matrix.shape[-2:]
    peak = ops.stop_gradient(ops.max(ops.abs(matrix), axis=(-2, -1), keepdims=True))
    usable = peak > 0
    scaled = ops.where(usable, matrix / ops.where(usable, peak, 1.0), 1.0)
    frobenius = _frobenius(scaled)
    scaled = scaled / frobenius
    transposed = ops.swapaxes(scaled, -1, -2)
    power = ops.matmul(transposed, scaled) if cols <= rows else ops.matmul(scaled, transposed)
    return peak, frobenius, power


def product_allowance(inner, dtype):
    """Bound of `|fl(AB) - AB|_F / (|A|_F |B|_F)` for an inner dimension `inner` on this device."""
    summation = inner * _roundoff(dtype)
    # 5 % covers 1 / (1 - d u) and Frobenius norms which are one only up to rounding.
    return 1.05 * (summation + 2.0 * _factor_roundoff(dtype))


def _roundoff(dtype):
    return 2.0**-53 if _keeps_float64(dtype) else 2.0**-24


def _keeps_float64(dtype):
    """Whether what is computed from this dtype stays float64: not on every backend of Keras."""
    return keras.backend.result_type(dtype, dtype) == "float64"


def _factor_roundoff(dtype):
    """Relative error to which the device may round the factors of a product before multiplying."""
    if _keeps_float64(dtype):
        return 0.0
    # A float64 factor becomes a float32 first.
    rounded = 2.0**-24 if keras.backend.standardize_dtype(dtype) == "float64" else 0.0
    return max(rounded, _product_roundoff())


def _product_roundoff():
    """The same for float32: the least precise that this device and its settings allow."""
    kind, setting = _device()
    # TensorFloat-32 keeps 10 explicit bits, bfloat16 (the default of a TPU's matrix unit) keeps 7.
    return max({"cpu": 0.0, "gpu": 2.0**-11, "tpu": 2.0**-8}[kind], _SETTINGS.get(setting, 2.0**-8))


# What a user may have set for the precision of float32 products, on PyTorch and JAX. Any other
# setting is taken for the coarsest one.
_SETTINGS = {
    None: 0.0,
    "default": 0.0,
    "highest": 0.0,
    "float32": 0.0,
    "high": 2.0**-11,
    "tensorfloat32": 2.0**-11,
}


def _device():
    """`"cpu"`, `"gpu"` or `"tpu"`, the least precise one in use, and the precision set, if any."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        kinds = {device.device_type for device in tf.config.list_logical_devices()}
        return ("tpu" if "TPU" in kinds else "gpu" if "GPU" in kinds else "cpu"), None
    if backend == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        kind = jax.default_backend()
        return (kind if kind in ("cpu", "tpu") else "gpu"), jax.config.jax_default_matmul_precision
    if backend == "torch":
        import torch  # pyright: ignore[reportMissingImports]

        kind = "gpu" if torch.cuda.is_available() else "cpu"
        return kind, torch.get_float32_matmul_precision()
    return "cpu", None


def _frobenius(matrix):
    return ops.sqrt(ops.sum(ops.square(matrix), axis=(-2, -1), keepdims=True))


def relative_slack(side, num_squarings=NUM_SQUARINGS):
    """Largest ratio of the bound to the norm in exact arithmetic for a smaller side `side`."""
    return math.exp(math.log(max(side, 1)) * 2.0 ** -(num_squarings + 2))
