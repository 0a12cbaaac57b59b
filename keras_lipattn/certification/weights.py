"""Weights in the precision in which the layers use them."""

from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras.src import backend

from keras_lipattn.linalg import computed_from


def cast_to_compute_dtype(value: Any, dtype: str | None) -> np.ndarray:
    """A weight or constant in float64, after the cast that it undergoes at inference.

    Args:
        value: variable, tensor, array or number.
        dtype: dtype of the computation; `None` for no cast.

    Returns:
        A float64 array. Values too large for `dtype` become infinite, as in the layer.
    """
    return _in_dtype(value, dtype).astype(np.float64)


def kernel_of(layer: keras.layers.Layer, name: str = "kernel") -> np.ndarray:
    """A weight of a layer in float64, after the cast to the compute dtype of the layer.

    A low-rank update is merged into the kernel, in the precision of the layer. The array is
    read-only.
    """
    with backend.AutocastScope(layer.compute_dtype):
        value = getattr(layer, name)
    # Some backends change the memory of a variable in place.
    kernel = _in_dtype(value, layer.compute_dtype).copy()
    return computed_from(kernel.astype(np.float64), "float64", computed_from(kernel))


def _in_dtype(value: Any, dtype: str | None) -> np.ndarray:
    """A weight or constant in the dtype in which it is used at inference."""
    if isinstance(value, keras.Variable):
        value = keras.ops.convert_to_tensor(value)
    array = np.asarray(keras.ops.convert_to_numpy(value))
    if dtype is not None and array.dtype.kind in "fV":
        # bfloat16 has kind "V": NumPy gets this dtype from ml_dtypes.
        target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            array = array.astype(target)
    return array


def bias_of(layer: keras.layers.Layer, name: str = "bias") -> np.ndarray | None:
    """The bias of a layer in float64 after the same cast, `None` if it has no bias."""
    bias = getattr(layer, name, None)
    return None if bias is None else cast_to_compute_dtype(bias, layer.compute_dtype)


def adds_bias_elsewhere(bias: np.ndarray | None, output_shape: tuple[int | None, ...]) -> bool:
    """Whether Keras may add this bias along another axis than the one it belongs to.

    On TensorFlow, `keras.ops.add(x, bias)` takes a bias with one axis longer than 1 for one of the
    last axis of `x`, or else of the axis after the batch, wherever the size fits. A bias of shape
    `(heads, 1)` is added along the tokens if there are as many tokens as heads.

    Args:
        bias: Bias of a layer, `None` if it has none.
        output_shape: Shape of the output with the batch axis. Shorter sequences are covered too.
    """
    if bias is None or not np.any(bias) or keras.backend.backend() != "tensorflow":
        return False
    long = [axis - bias.ndim for axis, size in enumerate(bias.shape) if size > 1]
    if len(long) != 1:
        return False
    (own,), size = long, bias.shape[long[0]]
    if output_shape[-1] == size:
        return own != -1
    first = output_shape[1]
    return own != 1 - len(output_shape) and (first is None or first >= size)
