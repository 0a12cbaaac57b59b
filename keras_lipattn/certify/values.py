"""Values of tensors in float64, with the weights as they run: what real arithmetic would give."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src import backend

from keras_lipattn.certify import graph
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.layers import CenterNormalization, MaxMin, PositionEmbedding, Residual

_CASTS = frozenset({"Cast", "SaturateCast"})
# Layers of ours that compute in the dtype of what they get.
_OURS = (CenterNormalization, MaxMin, PositionEmbedding, Residual)


class UnknownValue(Exception):
    """A value cannot be computed in float64. The message says why."""


class _AsRun(backend.AutocastScope):
    """Variables as they enter a computation in this dtype, then held in float64."""

    def maybe_cast(self, value):
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype)):
            return value
        return backend.cast(super().maybe_cast(value), "float64")


def require_float64() -> None:
    """Raises a `ValueError` where the backend has no float64."""
    if keras.backend.standardize_dtype(keras.ops.convert_to_tensor(np.zeros(1)).dtype) != "float64":
        raise ValueError(
            "A certificate around an input evaluates the model in float64, which this backend has "
            f"switched off. Received: backend={keras.backend.backend()!r}"
        )


def evaluate(
    operation: Any, args: Any, kwargs: Any, step: Step | None, dtype: str | None
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Values and masks of the outputs of one call.

    Args:
        operation: a layer, or a node of `keras.ops`.
        args: positional arguments, with a `TensorState` for every tensor, whose `near` is known.
        kwargs: keyword arguments, likewise.
        step: what the rule says about the call, `None` where there was no need to ask one.
        dtype: dtype in which the call computes.

    Returns:
        A list of pairs: array `(1, ...)`, and its Keras mask or `None`.

    Raises:
        UnknownValue: if a value is not known, or the call does not compute in float64.
    """
    args, kwargs = (keras.tree.map_structure(_tensor, part) for part in (args, kwargs))
    tensors = [leaf for leaf in keras.tree.flatten((args, kwargs)) if backend.is_tensor(leaf)]
    if type(operation).__name__ in _CASTS and not isinstance(operation, keras.layers.Layer):
        if keras.backend.is_float_dtype(operation.dtype):
            # Real arithmetic does not round.
            return [(np.asarray(_array(tensors[0]), np.float64), None)]
    if step is not None and step.value is not None:
        outputs = [keras.ops.convert_to_tensor(step.value)]
    elif step is not None and _is_spelled_out(step) and len(tensors) == 1:
        outputs = [keras.ops.convert_to_tensor(_affine(_array(tensors[0]), step))]
    elif step is not None and step.coefficients is not None:
        outputs = [keras.ops.convert_to_tensor(_combination(step))]
    else:
        outputs = keras.tree.flatten(_run(operation, args, kwargs, dtype))
    values = [_checked(value, starts=step is not None and step.starts) for value in outputs]
    masks = [backend.get_keras_mask(value) for value in outputs]
    if isinstance(operation, keras.layers.Layer) and operation.supports_masking:
        masks = _masks(operation, args, kwargs, masks)
    return [
        (value, None if mask is None else np.asarray(_array(mask), bool))
        for value, mask in zip(values, masks, strict=True)
    ]


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, TensorState):
        return leaf
    if leaf.near is None:
        raise UnknownValue("the value of its input is not known")
    tensor = keras.ops.convert_to_tensor(leaf.near.value)
    if leaf.near.mask is not None:
        backend.set_keras_mask(tensor, keras.ops.convert_to_tensor(leaf.near.mask))
    return tensor


def _array(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor)


def _is_spelled_out(step: Step) -> bool:
    return step.is_linear_map and (step.bias is None or step.bias.ndim == 1)


def _affine(x: np.ndarray, step: Step) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if step.matrix is not None:
        x = x * step.matrix if step.matrix.ndim == 1 else x @ step.matrix
    return x if step.bias is None else x + step.bias


def _combination(step: Step) -> np.ndarray:
    """A sum with the coefficients that the certificate is for."""
    terms = []
    for coefficient, state in zip(step.coefficients or (), step.operands or (), strict=True):
        value = state.values if state.near is None else state.near.value
        if value is None:
            raise UnknownValue("the value of an input is not known")
        terms.append(np.asarray(value, np.float64) * coefficient)
    return sum(terms[1:], terms[0])


def _run(operation: Any, args: Any, kwargs: Any, dtype: str | None) -> Any:
    if isinstance(operation, keras.layers.Layer):
        module = getattr(type(operation).call, "__module__", "")
        # Layers inside would cast to their own dtype.
        alone = len(operation._flatten_layers(include_self=False)) == 0
        known = module.startswith("keras.src.layers.") or type(operation) in _OURS
        if not (alone and known and "call" not in vars(operation)):
            raise UnknownValue("it is not known to compute in float64 when its input is float64")
        if getattr(operation, "_call_has_training_arg", False):
            kwargs = {**kwargs, "training": False}
        if getattr(operation, "_call_has_mask_arg", False) and kwargs.get("mask") is None:
            kwargs = {**kwargs, "mask": _mask_of(args, kwargs)}
    scope = keras.StatelessScope(collect_losses=True)
    try:
        with scope, _AsRun(dtype), _in_float64(operation):
            return operation.call(*args, **kwargs)
    except Exception as error:
        # Whatever a backend raises for what it does not have in float64.
        kind = type(error).__name__
        raise UnknownValue(f"it cannot be evaluated in float64 ({kind})") from error


@contextlib.contextmanager
def _in_float64(operation: Any) -> Iterator[None]:
    """The layer casts what it computes to float64, and not to its own dtype."""
    fields = vars(operation)
    before = fields.get("_dtype_policy")
    if before is None:
        yield
        return
    fields["_dtype_policy"] = keras.DTypePolicy("float64")
    try:
        yield
    finally:
        fields["_dtype_policy"] = before


def _checked(tensor: Any, *, starts: bool) -> np.ndarray:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if keras.backend.is_float_dtype(dtype) and dtype != "float64" and not starts:
        raise UnknownValue(f"it computes in {dtype}")
    value = np.asarray(_array(tensor))
    if not keras.backend.is_float_dtype(dtype):
        return value
    value = value.astype(np.float64)
    if not np.isfinite(value).all():
        raise UnknownValue("its value is not finite")
    return value


def _mask_of(args: Any, kwargs: Any) -> Any:
    first = args[0] if args else next(iter(kwargs.values()), None)
    return keras.tree.map_structure(backend.get_keras_mask, first)


def _masks(layer: Any, args: Any, kwargs: Any, own: list) -> list:
    """Masks after a layer, as Keras passes them on."""
    if own and all(mask is not None for mask in own):
        return own
    first = args[0] if args else next(iter(kwargs.values()), None)
    previous = kwargs.get("mask")
    if previous is None:
        previous = _mask_of(args, kwargs)
    try:
        after = layer.compute_mask(first, previous)
    except graph.TRACE_ERRORS as error:
        raise UnknownValue(f"its mask cannot be computed ({error})") from error
    if after is None:
        return own
    after = after if isinstance(after, list | tuple) else [after]
    return [b if a is None else a for a, b in zip(own, after, strict=False)]
