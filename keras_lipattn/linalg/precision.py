"""Rounding errors: unit roundoffs of the dtypes, and of matrix products on the device in use."""

import keras
import numpy as np

# Largest relative error of rounding a number to the dtype.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# TensorFloat-32 keeps 10 explicit bits, as float16 does.
_TENSOR_FLOAT_32 = UNIT_ROUNDOFF["float16"]
SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)


def roundoff(dtype):
    """Unit roundoff of what is computed from this dtype on the backend in use."""
    return UNIT_ROUNDOFF["float64" if _keeps_float64(dtype) else "float32"]


def product_allowance(inner, dtype):
    """Bound of `|fl(AB) - AB|_F / (|A|_F |B|_F)` for an inner dimension `inner` on this device."""
    summation = inner * roundoff(dtype)
    # 5 % covers 1 / (1 - d u) and Frobenius norms that are one only up to rounding.
    return 1.05 * (summation + 2.0 * _factor_roundoff(dtype))


def _keeps_float64(dtype):
    """Whether what is computed from this dtype stays float64: not on every backend of Keras."""
    return keras.backend.result_type(dtype, dtype) == "float64"


def _factor_roundoff(dtype):
    """Relative error to which the device may round the factors of a product before multiplying."""
    if _keeps_float64(dtype):
        return 0.0
    # A float64 factor becomes a float32 first.
    is_float64 = keras.backend.standardize_dtype(dtype) == "float64"
    return max(UNIT_ROUNDOFF["float32"] if is_float64 else 0.0, _float32_factor_roundoff())


def _float32_factor_roundoff():
    """The same for float32: the largest error that this device and its settings allow."""
    kind, setting = _device()
    # A TPU's matrix unit rounds factors to bfloat16 by default. An unknown setting may do so too.
    coarsest = UNIT_ROUNDOFF["bfloat16"]
    of_device = {"cpu": 0.0, "gpu": _TENSOR_FLOAT_32, "tpu": coarsest}[kind]
    return max(of_device, _SETTINGS.get(setting, coarsest))


# Precisions of float32 products that a user can set on PyTorch and JAX.
_SETTINGS = {
    None: 0.0,
    "default": 0.0,
    "highest": 0.0,
    "float32": 0.0,
    "high": _TENSOR_FLOAT_32,
    "tensorfloat32": _TENSOR_FLOAT_32,
}


def _device():
    """Least precise device in use, `"cpu"`, `"gpu"` or `"tpu"`, and the precision set, if any."""
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
