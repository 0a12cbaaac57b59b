"""Pooling layers and operations (docs/theory.md, section 8)."""

import math
import types

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, TokenMixing, unbounded
from keras_lipattn.certification.reasons import (
    FIXED_SIZES,
    UNKNOWN_TOKENS,
    Cause,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.activations import convert
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

_MEAN = "mean over each window"
_MAX = "number of windows that contain a position"


@register_rule(
    keras.layers.AveragePooling1D, keras.layers.AveragePooling2D, keras.layers.AveragePooling3D
)
def average_pooling(layer, call):
    pool, strides = tuple(layer.pool_size), tuple(layer.strides)
    sizes, known, first = _window_axes(layer, call)
    if known:
        constant = layer_constants.average_pooling_constant(
            "l2", pool_size=pool, strides=strides, input_shape=sizes, padding=layer.padding
        )
    else:
        # If the size is not known, a window at the border may contain a single position.
        least = [k if layer.padding == "valid" else 1 for k in pool]
        constant = SAFETY * math.sqrt(
            math.prod(-(-k // s) / m for k, s, m in zip(pool, strides, least, strict=True))
        )
    exact = known and pool == strides and layer.padding == "valid"
    return _linear_pooling(constant, call, first, exact)


@register_rule(keras.layers.MaxPooling1D, keras.layers.MaxPooling2D, keras.layers.MaxPooling3D)
def max_pooling(layer, call):
    pool, strides = tuple(layer.pool_size), tuple(layer.strides)
    sizes, known, first = _window_axes(layer, call)
    if known:
        constant = layer_constants.max_pooling_constant(
            "l2",
            pool_size=pool,
            strides=strides,
            input_shape=sizes,
            padding=layer.padding,
            channels=1,
        )
    else:
        constant = SAFETY * math.sqrt(
            math.prod(-(-k // s) for k, s in zip(pool, strides, strict=True))
        )
    return _max_map(constant, math.prod(pool), call, first)


@register_rule(
    keras.layers.AdaptiveAveragePooling1D,
    keras.layers.AdaptiveAveragePooling2D,
    keras.layers.AdaptiveAveragePooling3D,
)
def adaptive_average_pooling(layer, call):
    loads, _, first = _adaptive(layer, call)
    if loads is None:
        return unbounded("its windows depend on a size that varies", remedy=FIXED_SIZES)
    constant = SAFETY * math.sqrt(math.prod(float(load.max()) for _, load in loads))
    return _linear_pooling(constant, call, first, False)


@register_rule(
    keras.layers.AdaptiveMaxPooling1D,
    keras.layers.AdaptiveMaxPooling2D,
    keras.layers.AdaptiveMaxPooling3D,
)
def adaptive_max_pooling(layer, call):
    loads, window, first = _adaptive(layer, call)
    if loads is None:
        return unbounded("its windows depend on a size that varies", remedy=FIXED_SIZES)
    constant = SAFETY * math.sqrt(math.prod(int(count.max()) for count, _ in loads))
    return _max_map(constant, window, call, first)


@register_rule(
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
)
def global_average_pooling(layer, call):
    first = layer.data_format == "channels_first"
    fewest = _fewest(call, first)
    mask = call.argument("mask")
    if mask is not None:
        mask = call.operand(mask)
        if mask.shape[-1:] != call.state.shape[-1 if first else 0 :][:1]:
            return unbounded("its mask does not have one entry for each token")
    if mask is not None or call.mask is not None:
        fewest = _fewest_valid(mask)
    constant = layer_constants.global_average_constant("l2", fewest)
    return _linear_pooling(
        constant, call, first, True, theorem=f"mean over at least {fewest} tokens"
    )


def _fewest_valid(mask: TensorState | None) -> int:
    """The smallest number of valid tokens of an example: 1 where the mask is not known."""
    known = None
    if mask is not None:
        known = mask.values if mask.enclosure is None else mask.enclosure.value
    return 1 if known is None else max(1, int(np.count_nonzero(known, axis=-1).min()))


@register_rule(
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
)
def global_max_pooling(layer, call):
    first = layer.data_format == "channels_first"
    return _max_map(1.0, call.state.tokens, call, first, exact=True)


@register_operation("AveragePool", "MaxPool")
def pooling_operation(operation, call):
    rank = call.state.rank - 2
    pool, strides = (
        (int(value),) * rank if np.ndim(value) == 0 else tuple(int(v) for v in value)
        for value in (operation.pool_size, operation.strides or operation.pool_size)
    )
    like = types.SimpleNamespace(
        pool_size=pool,
        strides=strides,
        padding=operation.padding,
        data_format=operation.data_format or keras.config.image_data_format(),
    )
    rule = max_pooling if type(operation).__name__ == "MaxPool" else average_pooling
    return rule(like, call)


def _linear_pooling(
    constant: float, call: LayerCall, first: bool, exact: bool, theorem: str = _MEAN
):
    if call.norm == "token" and first:
        return _converted(constant, call)
    if call.norm != "l2":
        constant, exact = 1.0, True
    if first:
        return LipschitzMap(constant=constant, theorem=theorem, exact=exact)
    return TokenMixing(constant=constant, theorem=theorem, exact=exact, range=call.state.range)


def _max_map(
    constant: float, window: int | None, call: LayerCall, first: bool, exact: bool = False
):
    if call.norm == "token" and not first:
        sizes = [size for size in (window, call.state.width) if size is not None]
        if not sizes:
            return unbounded(
                "neither its window nor its number of channels is known", cause=Cause.SIZE
            )
        constant = SAFETY * math.sqrt(min(sizes))
        theorem = "at most min(window, channels) tokens contribute to one"
    elif call.norm == "token":
        return _converted(constant, call)
    else:
        constant, theorem = (constant, _MAX) if call.norm == "l2" else (1.0, "maximum of entries")
    return LipschitzMap(
        constant=constant,
        theorem=theorem,
        exact=exact and call.norm != "token",
        range=entries_range(call),
    )


def entries_range(call: LayerCall, factor: float = 1.0) -> TokenRange | None:
    """The range of an output whose entries are at most `factor` times those of the input."""
    return TokenRange.up_to(factor * call.state.range.largest, call.width)


def _converted(constant: float, call: LayerCall) -> LipschitzMap:
    price = convert("l2", "token", call.state)
    if math.isinf(price):
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(constant=constant * price, theorem="2-norm, converted")


def _window_axes(layer, call: LayerCall):
    """Sizes of the pooled axes, whether all are known and fixed, and channels_first."""
    first = layer.data_format == "channels_first"
    window = slice(1, None) if first else slice(None, -1)
    sizes, varies = call.state.shape[window], call.state.dynamic[window]
    known = None not in sizes and not any(varies)
    return tuple(size or 0 for size in sizes), known, first


def _fewest(call: LayerCall, first: bool) -> int:
    """Smallest number of tokens of a global pooling."""
    window = slice(1, None) if first else slice(None, -1)
    sizes, varies = call.state.shape[window], call.state.dynamic[window]
    return math.prod(
        1 if dynamic or size is None else size for size, dynamic in zip(sizes, varies, strict=True)
    )


def _adaptive(layer, call: LayerCall):
    """Per axis: windows that contain a position and the sum of 1 / sizes; the largest window."""
    sizes, known, first = _window_axes(layer, call)
    if not known:
        return None, 0, first
    loads, window = [], 1
    for length, outputs in zip(sizes, tuple(layer.output_size), strict=True):
        starts = [i * length // outputs for i in range(outputs)]
        ends = [-(-(i + 1) * length // outputs) for i in range(outputs)]
        count, load = np.zeros(length, int), np.zeros(length)
        for start, end in zip(starts, ends, strict=True):
            count[start:end] += 1
            load[start:end] += 1.0 / (end - start)
        loads.append((count, load))
        window *= max(end - start for start, end in zip(starts, ends, strict=True))
    return loads, window, first
