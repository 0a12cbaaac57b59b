"""The proof of an export: which tensors of the served graph are the output of which layer.

`keras_lipattn.checker` reads it. It holds no constants, which the checker computes itself.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.rules.activations import name_of
from keras_lipattn.certification.weights import bias_of, cast_to_compute_dtype, kernel_of
from keras_lipattn.layers import (
    CenterNormalization,
    HalfAbs,
    L2MultiHeadAttention,
    MaxMin,
    NormalizedDense,
    NormPooling,
    OrthogonalDense,
    PositionEmbedding,
    Residual,
    ScaledCosineAttention,
    SelfAttention,
    SpectralDense,
)
from keras_lipattn.layers._dense import DenseLayer

SCHEMA = 1
_MASKS = ("mask", "query_mask", "value_mask", "key_mask")
# A step without a kind that the checker knows.
_OTHER = ("other", {}, {})
# Kind, parameters and arrays of a step.
_Description = tuple[str, dict[str, Any], dict[str, np.ndarray | None]]


class RecordedCalls:
    """The calls of layers and operations while a function is traced.

    Attributes:
        steps: The steps of the proof, by the tensor of their output.
    """

    def __init__(self):
        self.steps: dict[str, dict[str, Any]] = {}

    def add(self, operation: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Record a call. Calls inside of it were recorded before and win if they are known."""
        if not _is_symbolic(output):
            return
        known = self.steps.get(output.name)
        if known is not None and known["kind"] != "other":
            return
        tensors = [leaf for leaf in keras.tree.flatten(args) if _is_symbolic(leaf)]
        given = {name: value for name, value in kwargs.items() if name not in _MASKS}
        tensors += [leaf for leaf in keras.tree.flatten(given) if _is_symbolic(leaf)]
        tensors = list({tensor.name: tensor for tensor in tensors}.values()) or tensors
        masks = [kwargs.get(name) for name in _MASKS]
        if isinstance(operation, SelfAttention):
            masks += [getattr(tensor, "_keras_mask", None) for tensor in tensors]
        masks: list[Any] = [mask for mask in masks if _is_symbolic(mask)]
        try:
            kind, parameters, arrays = _describe(operation, args, given, tensors, bool(masks))
        except (AttributeError, IndexError, TypeError, ValueError):
            # A step that cannot be described is not checked, and the checker says so.
            kind, parameters, arrays = _OTHER
        if known is not None and kind == "other":
            return
        operands = tensors
        if kind == "combination":
            operands = [leaf for leaf in keras.tree.flatten([args, given]) if _is_symbolic(leaf)]
        self.steps[output.name] = {
            "layer": f"{type(operation).__name__} {operation.name!r}",
            "kind": kind,
            "inputs": [tensor.name for tensor in operands],
            "masks": sorted({mask.name for mask in masks}),
            "output": output.name,
            "parameters": parameters,
            "arrays": {
                name: {"sha256": _hash(array), "shape": list(array.shape)}
                for name, array in arrays.items()
                if array is not None
            },
        }


@contextlib.contextmanager
def recorded_calls() -> Iterator[RecordedCalls]:
    """Record the calls of all layers inside, as a context manager; not safe for threads."""
    import tensorflow as tf

    calls = RecordedCalls()
    original = keras.Operation.__call__

    def call(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        # Values of weights are read, which a graph cannot do.
        with tf.init_scope():
            calls.add(self, args, kwargs, output)
        return output

    keras.Operation.__call__ = call
    try:
        yield calls
    finally:
        keras.Operation.__call__ = original


def proof_of(calls: RecordedCalls, function: Any, signature: str) -> str:
    """The proof as JSON.

    Args:
        calls: The calls while the function was traced.
        function: The concrete function of the signature.
        signature: `"certified"` or `"serving_default"`.
    """
    outputs = function.structured_outputs
    output = outputs["logits"] if signature == "certified" else next(iter(outputs.values()))
    # Outputs of concrete functions are copies of the tensors that were returned.
    content = {
        "schema": SCHEMA,
        "signature": signature,
        "output": output.name,
        "steps": list(calls.steps.values()),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _is_symbolic(value: Any) -> bool:
    import tensorflow as tf

    return isinstance(value, tf.Tensor) and hasattr(value, "graph")


def _hash(array: np.ndarray) -> str:
    entries = np.ascontiguousarray(np.asarray(array, np.float64)).astype("<f8")
    return hashlib.sha256(entries.tobytes()).hexdigest()


def _describe(operation, args, kwargs, tensors, has_masks: bool) -> _Description:
    """The kind of step that a call is."""
    describe = _DESCRIPTIONS.get(type(operation))
    if describe is not None:
        return describe(operation, args, kwargs, tensors, has_masks)
    name = type(operation).__name__
    if isinstance(operation, keras.layers.Layer):
        return _OTHER
    if name in ("Add", "Subtract") and len(keras.tree.flatten([args, kwargs])) == len(
        [leaf for leaf in keras.tree.flatten([args, kwargs]) if _is_symbolic(leaf)]
    ):
        return "combination", {"coefficients": [1.0, 1.0 if name == "Add" else -1.0]}, {}
    activation = _OPERATIONS.get(name)
    if activation is not None:
        return "activation", {"activation": activation}, {}
    return _OTHER


_OPERATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Tanh": "tanh",
}


def _activation(function: Any) -> str:
    """Name of an activation; another text for one that the checker does not know."""
    if function is None or function is keras.activations.linear:
        return "linear"
    return name_of(function) or f"{getattr(function, '__name__', type(function).__name__)}"


def _dense(layer, args, kwargs, tensors, has_masks) -> _Description:
    if getattr(layer, "quantization_mode", None) is not None:
        return _OTHER
    if isinstance(layer, DenseLayer):
        kernel = layer.host_weights().weights().output
    else:
        kernel = kernel_of(layer)
    parameters = {"activation": _activation(layer.activation)}
    return "dense", parameters, {"kernel": kernel, "bias": bias_of(layer)}


def _einsum_dense(layer, args, kwargs, tensors, has_masks) -> _Description:
    operands, result = layer.equation.replace(" ", "").split("->")
    inputs, weights = operands.split(",")
    last = inputs[-1] + result[-1]
    if weights != last or inputs[:-1] != result[:-1] or set(last) & set(inputs[:-1]):
        return _OTHER
    return _dense(layer, args, kwargs, tensors, has_masks)


def _normalization(layer, args, kwargs, tensors, has_masks) -> _Description:
    parameters: dict[str, Any] = {"width": int(tensors[0].shape[-1])}
    kind = "center_normalization"
    if isinstance(layer, keras.layers.LayerNormalization):
        axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        rank = len(tensors[0].shape)
        if layer.rms_scaling or [axis % rank for axis in axes] != [rank - 1]:
            return _OTHER
        kind, parameters["epsilon"] = "layer_normalization", float(layer.epsilon)
    arrays = {
        name: None if weight is None else cast_to_compute_dtype(weight, layer.compute_dtype)
        for name, weight in (("gamma", layer.gamma), ("beta", layer.beta))
    }
    return kind, parameters, arrays


def _rms_normalization(layer, args, kwargs, tensors, has_masks) -> _Description:
    axes = np.ravel(layer.axis) % len(tensors[0].shape)
    if list(axes) != [len(tensors[0].shape) - 1]:
        return _OTHER
    scale = cast_to_compute_dtype(layer.scale, layer.compute_dtype)
    return "rms_normalization", {"epsilon": float(layer.epsilon)}, {"gamma": scale}


def _activation_layer(layer, args, kwargs, tensors, has_masks) -> _Description:
    return "activation", {"activation": _activation(layer.activation)}, {}


def _relu(layer, args, kwargs, tensors, has_masks) -> _Description:
    if layer.negative_slope or layer.threshold or layer.max_value is not None:
        return _OTHER
    return "activation", {"activation": "relu"}, {}


def _softmax(layer, args, kwargs, tensors, has_masks) -> _Description:
    if layer.axis not in (-1, len(tensors[0].shape) - 1) or has_masks or len(tensors) > 1:
        return _OTHER
    return "activation", {"activation": "softmax"}, {}


def _identity(layer, args, kwargs, tensors, has_masks) -> _Description:
    return "activation", {"activation": "linear"}, {}


def _sum(layer, args, kwargs, tensors, has_masks) -> _Description:
    leaves = [leaf for leaf in keras.tree.flatten([args, kwargs]) if _is_symbolic(leaf)]
    coefficients = [1.0] * len(leaves)
    if isinstance(layer, keras.layers.Subtract):
        coefficients[1] = -1.0
    elif isinstance(layer, keras.layers.Average):
        coefficients = [1.0 / len(leaves)] * len(leaves)
    elif isinstance(layer, Residual) and layer.alpha_value() is not None:
        alpha = float(cast_to_compute_dtype(np.float64(layer.alpha_value()), layer.compute_dtype))
        coefficients = [1.0 - alpha, alpha]
    return "combination", {"coefficients": coefficients}, {}


def _positions(layer, args, kwargs, tensors, has_masks) -> _Description:
    table = cast_to_compute_dtype(layer.embedding, layer.compute_dtype)
    return "positions", {}, {"table": table}


def _embedding(layer, args, kwargs, tensors, has_masks) -> _Description:
    return "source", {}, {}


def _sorting(layer, args, kwargs, tensors, has_masks) -> _Description:
    return "max_min", {}, {}


def _half_abs(layer, args, kwargs, tensors, has_masks) -> _Description:
    return "half_abs", {}, {}


def _norm_pooling(layer, args, kwargs, tensors, has_masks) -> _Description:
    window = [int(size) for size in layer.window(tensors[0].shape)]
    return "norm_pooling", {"window": window, "all": layer.pool_size is None}, {}


def _reshape(layer, args, kwargs, tensors, has_masks) -> _Description:
    shape = [-1]
    if isinstance(layer, keras.layers.Reshape):
        shape = [int(size) for size in layer.target_shape]
    return "reshape", {"shape": shape, "flatten": isinstance(layer, keras.layers.Flatten)}, {}


def _permute(layer, args, kwargs, tensors, has_masks) -> _Description:
    return "permute", {"order": [int(axis) for axis in layer.dims]}, {}


def _global_pooling(layer, args, kwargs, tensors, has_masks) -> _Description:
    if layer.data_format != "channels_last" or layer.keepdims:
        return _OTHER
    if isinstance(layer, _GLOBAL_MAXIMA):
        return "global_max", {}, {}
    return "global_average", {"masked": has_masks}, {}


def _pooling(layer, args, kwargs, tensors, has_masks) -> _Description:
    if layer.data_format != "channels_last":
        return _OTHER
    kind = "max_pooling" if isinstance(layer, keras.layers.MaxPooling1D) else "average_pooling"
    parameters = {
        "pool_size": int(np.ravel(layer.pool_size)[0]),
        "strides": int(np.ravel(layer.strides)[0]),
        "padding": layer.padding,
    }
    return kind, parameters, {}


def _mask_parameters(layer, kwargs, window: int | None) -> dict[str, Any] | None:
    """What is visible, `None` for a mask that is not a constant."""
    if kwargs.get("return_attention_scores") or kwargs.get("token_weights") is not None:
        return None
    parameters: dict[str, Any] = {"causal": bool(kwargs.get("use_causal_mask")), "window": window}
    pairs = kwargs.get("attention_mask")
    if pairs is None:
        return parameters
    import tensorflow as tf

    value = tf.get_static_value(pairs) if isinstance(pairs, tf.Tensor) else np.asarray(pairs)
    if value is None or math.prod(value.shape[:-2]) != 1:
        return None
    matrix = np.asarray(value, bool).reshape(value.shape[-2:])
    return {**parameters, "pairs": matrix.astype(int).tolist()}


def _own_attention(layer, args, kwargs, tensors, has_masks) -> _Description:
    parameters = _mask_parameters(layer, kwargs, layer.sliding_window)
    if parameters is None or len(layer.output_token) != 1 or layer.token_radius is not None:
        return _OTHER
    rank = len(tensors[0].shape)
    axes = layer.attention_axes
    if axes is None:
        axes = list(range(1, rank - 1))
    axes = axes if isinstance(axes, list | tuple) else [axes]
    parameters["axes"] = sorted(int(axis) % rank for axis in axes)
    parameters["heads"] = layer.num_heads
    given = kwargs.get("attention_mask")
    given = np.asarray(parameters["pairs"], bool) if given is not None else None
    cap_mask = layer.cap_mask_class(given, parameters["causal"])
    state = layer.host_weights()
    weights = state.weights(cap_mask)
    arrays: dict[str, Any] = {
        "projection": weights.projection,
        "output": weights.output.reshape(-1, weights.output.shape[-1]),
        "bias": bias_of(layer, "output_bias"),
    }
    if isinstance(layer, ScaledCosineAttention):
        parameters.update(
            key_dim=layer.key_dim,
            epsilon=float(layer.epsilon),
            temperature=float(layer.temperature),
        )
        names = ("query_bias", "key_bias", "value_bias")
        return "cosine_attention", parameters, {**arrays, **{n: bias_of(layer, n) for n in names}}
    if layer.relative_bias is not None:
        return _OTHER
    for name, sizes in layer.rounding_allowances(state, cap_mask).items():
        parameters[name] = np.asarray(sizes, np.float64).tolist()
    return "distance_attention", parameters, arrays


def _dot_product_attention(layer, args, kwargs, tensors, has_masks) -> _Description:
    parameters = _mask_parameters(layer, kwargs, layer._sliding_window)
    rank = len(tensors[0].shape)
    if parameters is None or layer._use_gate or rank != 3 or len(tensors) != 1:
        return _OTHER
    if 1 in (layer._key_dim, layer._value_dim) and tensors[0].shape[1] == layer._num_heads:
        # `keras.ops.add` then adds a bias `(heads, 1)` along the tokens, under TensorFlow.
        return _OTHER
    parts = {
        "query": layer._query_dense,
        "key": layer._key_dense,
        "value": layer._value_dense,
        "output": layer._output_dense,
    }
    arrays: dict[str, Any] = {name: kernel_of(part) for name, part in parts.items()}
    for name, part in parts.items():
        arrays["bias" if name == "output" else f"{name}_bias"] = bias_of(part)
    return "dot_product_attention", {**parameters, "axes": [1]}, arrays


_GLOBAL_MAXIMA = (keras.layers.GlobalMaxPooling1D, keras.layers.GlobalMaxPooling2D)
# Exact types: a subclass may have another `call`.
_DESCRIPTIONS: dict[type, Callable[..., _Description]] = {
    **dict.fromkeys((keras.layers.Dense, SpectralDense, OrthogonalDense, NormalizedDense), _dense),
    keras.layers.EinsumDense: _einsum_dense,
    **dict.fromkeys((CenterNormalization, keras.layers.LayerNormalization), _normalization),
    keras.layers.RMSNormalization: _rms_normalization,
    keras.layers.Activation: _activation_layer,
    keras.layers.ReLU: _relu,
    keras.layers.Softmax: _softmax,
    **dict.fromkeys(
        (
            keras.layers.Dropout,
            keras.layers.GaussianDropout,
            keras.layers.GaussianNoise,
            keras.layers.Identity,
            keras.layers.SpatialDropout1D,
        ),
        _identity,
    ),
    **dict.fromkeys(
        (keras.layers.Add, keras.layers.Average, keras.layers.Subtract, Residual), _sum
    ),
    PositionEmbedding: _positions,
    keras.layers.Embedding: _embedding,
    MaxMin: _sorting,
    HalfAbs: _half_abs,
    NormPooling: _norm_pooling,
    **dict.fromkeys((keras.layers.Flatten, keras.layers.Reshape), _reshape),
    keras.layers.Permute: _permute,
    **dict.fromkeys(
        (
            keras.layers.GlobalAveragePooling1D,
            keras.layers.GlobalAveragePooling2D,
            *_GLOBAL_MAXIMA,
        ),
        _global_pooling,
    ),
    **dict.fromkeys((keras.layers.AveragePooling1D, keras.layers.MaxPooling1D), _pooling),
    **dict.fromkeys((L2MultiHeadAttention, ScaledCosineAttention), _own_attention),
    keras.layers.MultiHeadAttention: _dot_product_attention,
}
