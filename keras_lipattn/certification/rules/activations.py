"""Activations: elementwise functions, softmax and log-softmax (docs/theory.md, section 8)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import Affine, Elementwise, LipschitzMap, chain, unbounded
from keras_lipattn.certification.reasons import (
    NOT_FINITE,
    REPLACEMENTS,
    UNKNOWN_ACTIVATION,
    UNKNOWN_TOKENS,
    Cause,
    Reason,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import cast_to_compute_dtype
from keras_lipattn.linalg import SAFETY

# Intervals that contain the values of saturating activations.
_RANGES = {
    "hard_sigmoid": (0.0, 1.0),
    "hard_tanh": (-1.0, 1.0),
    "relu6": (0.0, 6.0),
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "softsign": (-1.0, 1.0),
    "sparse_sigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
}
# |f(0)|, rounded up, if it is not 0.
_AT_ZERO = {
    "hard_sigmoid": 0.5,
    "log_sigmoid": 0.693148,
    "sigmoid": 0.5,
    "softplus": 0.693148,
    "sparse_plus": 0.25,
    "sparse_sigmoid": 0.5,
    "squareplus": 1.0,
}

_BAD_PARAMETER = Reason(
    "its parameter is not a finite number in its range", remedy="use a valid parameter"
)

_ALONG_AN_AXIS = frozenset({"softmax", "log_softmax"})


def named(name: str, call: LayerCall, state: TensorState, *, axis: Any = -1) -> LipschitzMap:
    """The map of an activation of Keras with default parameters.

    Args:
        name: its name in `keras.activations`, or `"gelu_tanh"`.
        call: the call.
        state: the input of the activation.
        axis: for softmax and log-softmax, the axis or axes they act along, batch axis included.

    Returns:
        A `LipschitzMap`.
    """
    if name in layer_constants.UNBOUNDED_ACTIVATIONS:
        return _unbounded(name, state)
    if name in _ALONG_AN_AXIS:
        return _along(name, call, state, axis)
    constant = layer_constants.activation_constant(name, call.norm)
    least = layer_constants.LEAST_SLOPES.get(name, 0.0)
    layer_map = slope(constant, state, name=name, least=least)
    return dataclasses.replace(layer_map, function_of=(name, state, 1.0))


def slope(
    constant: float, state: TensorState, *, name: str = "", least: float | None = None
) -> LipschitzMap:
    """The map of an elementwise function with slopes of at most `constant` in size.

    Args:
        constant: bound of the sizes of the slopes.
        state: the input.
        name: name of the activation, if it has one.
        least: lower bound of the slopes, `-constant` by default.
    """
    if name == "linear":
        return Affine(constant=1.0, theorem="identity", exact=True)
    token_range = None
    if state.width is not None and name in _RANGES:
        token_range = TokenRange.of_entries(*_RANGES[name], state.width)
    return Elementwise(
        constant=constant,
        theorem="largest slope",
        exact=True,
        range=token_range,
        value_at_zero=_AT_ZERO.get(name, 0.0),
        slopes=None if least is None else (least, constant),
    )


def function(
    activation: Callable | None, call: LayerCall, state: TensorState
) -> LipschitzMap | None:
    """The map of the `activation` argument of a layer, `None` for the identity."""
    if activation is None or activation is keras.activations.linear or call.drop_activation:
        return None
    if isinstance(activation, keras.layers.Layer):
        return call.ask(activation, state)
    name = name_of(activation)
    if not name:
        return unbounded(UNKNOWN_ACTIVATION)
    return named(name, call, state)


def name_of(activation: Any) -> str:
    """Name of an activation function of Keras; empty for any other function."""
    name = getattr(activation, "__name__", type(activation).__name__)
    if not (
        name in layer_constants.ACTIVATIONS
        or name in layer_constants.UNBOUNDED_ACTIVATIONS
        or name in _ALONG_AN_AXIS
    ):
        return ""
    # Only the functions of Keras themselves: another function may have the same name.
    if activation is getattr(keras.activations, name, None):
        return name
    if activation is getattr(keras.ops, name, None):
        # `keras.ops.gelu` uses the tanh approximation by default.
        return "gelu_tanh" if name == "gelu" else name
    return ""


def with_activation(
    layer_map: LipschitzMap, layer: Any, call: LayerCall, width: int | None
) -> LipschitzMap:
    """The linear part of a layer followed by its `activation`; `width` is its last axis."""
    shape = (*call.shape[:-1], width) if call.shape else ()
    between = call.state.replace(
        shape=shape, dynamic=call.dynamic, range=TokenRange(), anchor=None, linear=None
    )
    after = function(getattr(layer, "activation", None), call, between)
    if after is None:
        return layer_map
    # The map of a saturating activation has a range of its own.
    return chain(layer_map, after)


def _along(name: str, call: LayerCall, state: TensorState, axis: Any) -> LipschitzMap:
    rank = state.rank
    if axis is None:
        return unbounded(f"{name} over all axes mixes the examples of a batch", cause=Cause.BATCH)
    axes = {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    if 0 in axes:
        return unbounded(f"{name} along the batch axis mixes examples", cause=Cause.BATCH)
    width = product(tuple(state.shape[a - 1] for a in axes))
    if name == "log_softmax" and width is None:
        return unbounded("the length of the log-softmax is not known", cause=Cause.SIZE)
    last_only = axes == {rank - 1}
    if call.norm == "linf" or last_only:
        constant = layer_constants.activation_constant(name, call.norm, width=width)
    else:
        constant = layer_constants.activation_constant(name, "l2", width=width)
        if call.norm == "token":
            constant *= convert("l2", "token", state)
    if math.isinf(constant):
        return unbounded(UNKNOWN_TOKENS)
    token_range = None
    if name == "log_softmax":
        # Between -2 max|x| - log(width) and 0.
        token_range = TokenRange.up_to(
            2.0 * state.range.largest + math.log(width or 1), state.width
        )
    elif state.width is not None:
        token_range = TokenRange.of_entries(0.0, 1.0, state.width)
        if last_only:
            # Probabilities have norm 1 at most.
            token_range = TokenRange(1.0, None, 1.0)
    theorem = "norm of diag(p) - p p^T" if name == "softmax" else f"norm of the Jacobian of {name}"
    return LipschitzMap(
        constant=constant, theorem=theorem, exact=name == "softmax" and last_only, range=token_range
    )


def convert(known: str, wanted: str, state: TensorState) -> float:
    """Factor for a bound that is known in another norm, for tensors of the shape of `state`."""
    if known == wanted:
        return 1.0
    tokens, entries = state.tokens, state.entries
    if tokens is None or entries is None:
        return math.inf
    return layer_constants.conversion_constant(
        wanted, known, tokens=tokens, width=max(entries // max(tokens, 1), 1)
    )


def _unbounded(name: str, state: TensorState) -> LipschitzMap:
    largest = state.range.largest
    if name == "exponential" and largest < 700.0:
        slope_there = math.exp(largest) * (1.0 + 1e-9)
        token_range = None
        if state.width is not None:
            token_range = TokenRange.of_entries(0.0, slope_there, state.width)
        return LipschitzMap(
            constant=slope_there,
            theorem="largest slope on the range of the entries",
            range=token_range,
        )
    return unbounded(
        layer_constants.UNBOUNDED_ACTIVATIONS[name], replacement=REPLACEMENTS["Activation"]
    )


@register_rule(keras.layers.Activation)
def activation(layer, call):
    layer_map = function(layer.activation, call, call.state)
    return layer_map or Affine(constant=1.0, theorem="identity", exact=True)


@register_rule(keras.layers.ReLU)
def relu(layer, call):
    return _relu(layer, call)


@register_operation("ReLU")
def relu_operation(operation, call):
    return _relu(operation, call)


def _relu(parameters, call: LayerCall) -> LipschitzMap:
    most = math.inf if parameters.max_value is None else parameters.max_value
    if not _are_finite(parameters.negative_slope or 0.0) or not most >= 0.0:
        return unbounded(_BAD_PARAMETER)
    if parameters.threshold:
        return unbounded(f"it jumps at its threshold {parameters.threshold}")
    constant = _slope(parameters.negative_slope or 0.0)
    least = min(0.0, _least_slope(parameters.negative_slope or 0.0))
    layer_map = slope(constant, call.state, least=least)
    if math.isfinite(most) and not parameters.negative_slope and call.state.width:
        bounded = TokenRange.of_entries(0.0, float(most), call.state.width)
        return dataclasses.replace(layer_map, range=bounded)
    return layer_map


@register_rule(keras.layers.LeakyReLU)
def leaky_relu(layer, call):
    return _leaky(layer.negative_slope, call)


def _leaky(negative_slope: float, call: LayerCall) -> LipschitzMap:
    if not _are_finite(negative_slope):
        return unbounded(_BAD_PARAMETER)
    least = min(1.0, _least_slope(negative_slope))
    return slope(_slope(negative_slope), call.state, least=least)


def _are_finite(*parameters: Any) -> bool:
    """Whether parameters of an activation are finite numbers, in float32 too."""
    with np.errstate(over="ignore"):
        return all(
            isinstance(one, bool | int | float | np.number | np.bool_)
            and bool(np.isfinite(np.float32(one)))
            for one in parameters
        )


def _slope(parameter: float) -> float:
    """Constant of a slope that some backends store in float32."""
    return layer_constants.slope_constant([parameter, float(np.float32(parameter))])


def _least_slope(parameter: float) -> float:
    """A lower bound of a slope that some backends store in float32."""
    return min(float(parameter), float(np.float32(parameter)))


@register_rule(keras.layers.PReLU)
def prelu(layer, call):
    alpha = cast_to_compute_dtype(layer.alpha, layer.compute_dtype)
    if not np.isfinite(alpha).all():
        return unbounded(NOT_FINITE)
    least = float(np.min(alpha, initial=1.0))
    return slope(layer_constants.slope_constant(alpha), call.state, least=least)


@register_rule(keras.layers.ELU)
def elu(layer, call):
    return _elu(layer.alpha, call)


def _elu(alpha: float, call: LayerCall) -> LipschitzMap:
    if not _are_finite(alpha):
        return unbounded(_BAD_PARAMETER)
    return slope(_slope(alpha), call.state, least=min(0.0, _least_slope(alpha)))


@register_rule(keras.layers.Softmax)
def softmax(layer, call):
    if call.drop_activation:
        return Affine(constant=1.0, theorem="logits before the softmax")
    return named("softmax", call, call.state, axis=layer.axis)


_PLAIN_OPERATIONS = {
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "HardTanh": "hard_tanh",
    "LogSigmoid": "log_sigmoid",
    "Mish": "mish",
    "Relu": "relu",
    "Relu6": "relu6",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "SparsePlus": "sparse_plus",
    "SparseSigmoid": "sparse_sigmoid",
    "Tanh": "tanh",
    "TanhShrink": "tanh_shrink",
    "Exp": "exponential",
    "Glu": "glu",
    "HardShrink": "hard_shrink",
    "Sparsemax": "sparsemax",
    "Threshold": "threshold",
}


@register_operation(*_PLAIN_OPERATIONS)
def plain_operation(operation, call):
    return named(_PLAIN_OPERATIONS[type(operation).__name__], call, call.state)


@register_operation("Gelu")
def gelu(operation, call):
    return named("gelu_tanh" if operation.approximate else "gelu", call, call.state)


@register_operation("LeakyRelu")
def leaky_relu_operation(operation, call):
    return _leaky(operation.negative_slope, call)


@register_operation("Elu", "Celu")
def elu_operation(operation, call):
    alpha = operation.alpha
    if not _are_finite(alpha):
        return unbounded(_BAD_PARAMETER)
    if type(operation).__name__ == "Celu":
        if not alpha > 0.0:
            return unbounded(
                "its alpha is not positive, so its slope is unbounded",
                replacement=REPLACEMENTS["Activation"],
            )
        # The slope is exp(x / alpha) <= 1 on the negative side, whatever alpha > 0.
        alpha = 1.0
    return _elu(alpha, call)


@register_operation("SoftShrink")
def soft_shrink(operation, call):
    if not _are_finite(operation.threshold) or operation.threshold < 0.0:
        return unbounded(_BAD_PARAMETER)
    return named("soft_shrink", call, call.state)


@register_operation("Squareplus")
def squareplus(operation, call):
    if not _are_finite(operation.b) or operation.b < 0.0:
        return unbounded(_BAD_PARAMETER)
    constant = layer_constants.activation_constant("squareplus", call.norm)
    layer_map = slope(constant, call.state)
    at_zero = SAFETY * math.sqrt(operation.b) / 2.0
    return dataclasses.replace(layer_map, value_at_zero=at_zero)


@register_operation("Softmax", "LogSoftmax")
def softmax_operation(operation, call):
    if call.drop_activation:
        return Affine(constant=1.0, theorem="logits before the softmax")
    name = "softmax" if type(operation).__name__ == "Softmax" else "log_softmax"
    return named(name, call, call.state, axis=operation.axis)
