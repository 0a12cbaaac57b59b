"""Evaluation of single calls in float64, with the weights used at inference."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import KerasTensor
from keras.src import backend

from keras_lipattn.certification.trace import TracedCall
from keras_lipattn.layers import (
    CenterNormalization,
    HalfAbs,
    MaxMin,
    NormPooling,
    PositionEmbedding,
    Residual,
    SpaceToDepth,
)

# Layers of this package that compute in the dtype of their input.
_PLAIN = (
    CenterNormalization,
    HalfAbs,
    MaxMin,
    NormPooling,
    PositionEmbedding,
    Residual,
    SpaceToDepth,
)


class UnknownValue(Exception):
    """A value cannot be computed in float64; the message says why."""


class _RoundedVariables(backend.AutocastScope):
    """Variables rounded to this dtype, then cast to float64."""

    def maybe_cast(self, value):
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype)):
            return value
        return backend.cast(super().maybe_cast(value), "float64")


def require_float64() -> None:
    """Raises a `ValueError` if the backend has no float64."""
    if keras.backend.standardize_dtype(keras.ops.convert_to_tensor(np.zeros(1)).dtype) != "float64":
        raise ValueError(
            "A local certificate needs float64, which is disabled in this backend. "
            f"Received: backend={keras.backend.backend()!r}"
        )


def evaluate(
    call: TracedCall, value_of: Callable[[KerasTensor], np.ndarray | None]
) -> list[np.ndarray]:
    """Values of the outputs of one call.

    Args:
        call: the call, traced for one example.
        value_of: the value of a tensor, `None` where it is not known.

    Returns:
        Arrays, float64 where they are floats.

    Raises:
        UnknownValue: if a value is not known, or the call does not compute in float64.
    """

    def fill(leaf):
        if isinstance(leaf, np.ndarray) and leaf.dtype in (np.float16, np.float32):
            # A constant of the model. Some operations do not mix dtypes.
            return leaf.astype(np.float64)
        if not isinstance(leaf, KerasTensor):
            return leaf
        value = value_of(leaf)
        if value is None:
            raise UnknownValue("the value of its input is not known")
        tensor = keras.ops.convert_to_tensor(value)
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            # A constant of the model may be float32, and some operations do not mix dtypes.
            tensor = keras.ops.cast(tensor, "float64")
        mask = call.masks.get(id(leaf))
        if mask is not None:
            known = value_of(mask)
            if known is None:
                raise UnknownValue("the mask of its input is not known")
            backend.set_keras_mask(tensor, keras.ops.convert_to_tensor(known))
        return tensor

    args, kwargs = (keras.tree.map_structure(fill, part) for part in (call.args, call.kwargs))
    outputs = keras.tree.flatten(_run(call.operation, args, kwargs, call.compute_dtype))
    if len(outputs) != len(call.outputs):
        raise UnknownValue("it returns something else for one example")
    return [_checked(output) for output in outputs]


def _run(operation: Any, args: Any, kwargs: Any, dtype: str | None) -> Any:
    if isinstance(operation, keras.layers.Layer) and not _computes_in_float64(operation):
        raise UnknownValue("it is not known to compute in float64 when its input is float64")
    scope = keras.StatelessScope(collect_losses=True)
    try:
        with scope, _RoundedVariables(dtype), in_float64(operation):
            return operation.call(*args, **kwargs)
    except Exception as error:
        # Backends raise different errors for operations that they do not have in float64.
        kind = type(error).__name__
        raise UnknownValue(f"it cannot be evaluated in float64 ({kind})") from error


def _computes_in_float64(layer: keras.layers.Layer) -> bool:
    if "call" in vars(layer):
        return False
    inner = layer._flatten_layers()
    # An inner layer rounds its variables only if its compute and variable dtypes differ.
    alike = all(one.compute_dtype == one.variable_dtype for one in inner) or len(inner) == 1
    known = all(
        getattr(type(one).call, "__module__", "").startswith("keras.src.layers.")
        or type(one) in _PLAIN
        for one in inner
    )
    return alike and known


@contextlib.contextmanager
def in_float64(operation: Any) -> Iterator[None]:
    """Sets the dtype policy of a layer and its inner layers to float64 for a while."""
    layers = operation._flatten_layers() if isinstance(operation, keras.layers.Layer) else []
    before = [vars(layer)["_dtype_policy"] for layer in layers]
    for layer in layers:
        vars(layer)["_dtype_policy"] = keras.DTypePolicy("float64")
    try:
        yield
    finally:
        for layer, policy in zip(layers, before, strict=True):
            vars(layer)["_dtype_policy"] = policy


def _checked(tensor: Any) -> np.ndarray:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if keras.backend.is_float_dtype(dtype) and dtype != "float64":
        raise UnknownValue(f"it computes in {dtype}")
    value = np.asarray(keras.ops.convert_to_numpy(tensor))
    if not keras.backend.is_float_dtype(dtype):
        return value
    if not np.isfinite(value).all():
        raise UnknownValue("its value is not finite")
    return value
