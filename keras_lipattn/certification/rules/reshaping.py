"""Moving entries around: reshape, permute, pad, crop, repeat (docs/theory.md, section 8)."""

import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, TokenMixing, unbounded
from keras_lipattn.certification.reasons import (
    Cause,
    Reason,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

_UNKNOWN = Reason("the number of tokens that it joins into one is not known", cause=Cause.SIZE)


def regroup(call: LayerCall, merged: int | None, theorem: str = "entries move") -> LipschitzMap:
    """The map of a rearrangement where each output token has parts of `merged` input tokens."""
    if call.norm == "token" and merged is None:
        return unbounded(_UNKNOWN)
    constant = layer_constants.regroup_constant(call.norm, merged or 1)
    # The norm of an output token is at most that of `merged` input tokens.
    token_range = None
    if merged is not None and call.state.range.bounded:
        old = call.state.range
        token_range = TokenRange(SAFETY * math.sqrt(merged) * old.outer_radius, None, old.largest)
    return LipschitzMap(
        constant=constant, theorem=theorem, exact=call.norm != "token", range=token_range
    )


def tokens_move(call: LayerCall, theorem: str = "tokens move") -> LipschitzMap:
    """The map of a rearrangement or selection of whole tokens."""
    return TokenMixing(
        constant=1.0,
        theorem=theorem,
        exact=True,
        range=call.state.range,
    )


def reshape_map(state: TensorState, shape: tuple[int | None, ...], call: LayerCall) -> LipschitzMap:
    """The map of a row-major reshape of `state` to `shape`."""
    old, new = state.width, shape[-1] if shape else 1
    if old is not None and old == new:
        return tokens_move(call)
    if old is None or new is None:
        merged = None
    elif new <= old and old % new == 0:
        merged = 1
    elif new % old == 0:
        merged = new // old
    else:
        merged = (new - 2) // old + 2
    if merged is not None and state.tokens:
        # An output token has parts of at most all tokens of an example.
        merged = min(merged, state.fold * state.tokens)
    return regroup(call, merged)


@register_rule(keras.layers.Flatten)
def flatten(layer, call):
    return regroup(call, call.state.tokens, "all tokens in one")


@register_rule(keras.layers.Reshape)
def reshape(layer, call):
    return reshape_map(call.state, call.shape, call)


@register_operation("Squeeze")
def squeeze(operation, call):
    if call.argument("axis") is None and operation.axis is None:
        return unbounded("without `axis` it also removes a batch axis of size 1", cause=Cause.BATCH)
    return reshape_map(call.state, call.shape, call)


@register_operation("Reshape", "Ravel", "ExpandDims")
def reshape_operation(operation, call):
    return reshape_map(call.state, call.shape, call)


def permute_map(order: tuple[int, ...], call: LayerCall) -> LipschitzMap:
    """The map of a permutation of the axes; `order` includes the batch axis."""
    if order[0] != 0:
        return unbounded("it moves the batch axis", cause=Cause.BATCH)
    if order[-1] == len(order) - 1:
        return tokens_move(call, "axes of tokens move")
    new_width = call.shape[-1] if call.shape else None
    return regroup(call, new_width, "axes move")


@register_rule(keras.layers.Permute)
def permute(layer, call):
    return permute_map((0, *layer.dims), call)


@register_operation("Transpose")
def transpose(operation, call):
    rank = call.state.rank
    axes = tuple(reversed(range(rank))) if operation.axes is None else operation.axes
    return permute_map(tuple(axis % rank for axis in axes), call)


@register_operation("Swapaxes")
def swapaxes(operation, call):
    order = list(range(len(call.state.shape) + 1))
    a, b = operation.axis1 % len(order), operation.axis2 % len(order)
    order[a], order[b] = order[b], order[a]
    return permute_map(tuple(order), call)


@register_operation("Moveaxis")
def moveaxis(operation, call):
    rank = call.state.rank
    labels = np.empty(tuple(range(2, 2 + rank)), bool)
    moved = np.moveaxis(labels, operation.source, operation.destination)
    order = [size - 2 for size in moved.shape]
    return permute_map(tuple(order), call)


@register_rule(keras.layers.RepeatVector)
def repeat_vector(layer, call):
    return repeated(call, layer.n)


def repeated(call: LayerCall, times: int) -> LipschitzMap:
    """The map of a repetition of every token."""
    constant = SAFETY * math.sqrt(times) if call.norm == "l2" else 1.0
    return TokenMixing(
        constant=constant,
        theorem="each entry repeated",
        exact=True,
        range=call.state.range,
    )


@register_rule(keras.layers.UpSampling1D)
def up_sampling_1d(layer, call):
    return repeated(call, int(layer.size))


@register_rule(keras.layers.UpSampling3D)
def up_sampling_3d(layer, call):
    if layer.data_format == "channels_first":
        return spatial_last(repeated(call, math.prod(layer.size)), call)
    return repeated(call, math.prod(layer.size))


def spatial_last(layer_map: LipschitzMap, call: LayerCall) -> LipschitzMap:
    """The map of a repetition with channels first, where the last axis is one of the image.

    The constants in the 2-norm and the max norm stay the same. A token may repeat some entries.
    """
    if call.norm == "token":
        return unbounded('in the token norm only `data_format="channels_last"` has a rule')
    return LipschitzMap(
        constant=layer_map.constant, theorem=layer_map.theorem, exact=layer_map.exact
    )


@register_rule(
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
)
def crop_or_pad(layer, call):
    theorem = "entries are dropped or zeros added"
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        # The last axis is one of the image.
        return LipschitzMap(constant=1.0, theorem=theorem, exact=True)
    return TokenMixing(
        constant=1.0, theorem=theorem, exact=True, range=call.state.range.about_origin()
    )
