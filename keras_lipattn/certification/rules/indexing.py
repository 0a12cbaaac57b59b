"""Operations that drop, pad or repeat entries (docs/theory.md, section 8)."""

import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import (
    LipschitzMap,
    TokenMixing,
    unbounded,
)
from keras_lipattn.certification.reasons import (
    MOVES_BATCH,
    UNKNOWN_TOKENS,
    Cause,
)
from keras_lipattn.certification.registry import register_operation
from keras_lipattn.certification.rules.linear_operations import copies
from keras_lipattn.certification.rules.pooling import entries_range
from keras_lipattn.certification.rules.reductions import reduced_axes
from keras_lipattn.certification.rules.reshaping import tokens_move
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY


@register_operation("Slice")
def slice_operation(operation, call):
    start_indices = call.argument("start_indices")
    if any(isinstance(leaf, TensorState) for leaf in keras.tree.flatten(start_indices)):
        return unbounded("its start indices are not constants of the model")
    if int(np.ravel(call.constant(start_indices))[0]) != 0:
        return unbounded(MOVES_BATCH)
    return LipschitzMap(
        constant=1.0, theorem="entries are dropped", exact=True, range=_about_origin(call)
    )


@register_operation("GetItem")
def get_item(operation, call):
    key = call.argument("key")
    keys = list(key) if isinstance(key, tuple | list) else [key]
    basic = all(
        k is None or k is Ellipsis or (isinstance(k, int | slice) and not isinstance(k, bool))
        for k in keys
    )
    if not basic:
        return _picked(operation, call)
    rank = call.state.rank
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (rank - used)
    else:
        keys += [slice(None)] * (rank - used)
    if keys[0] != slice(None):
        return unbounded(MOVES_BATCH)
    last = keys[-1]
    if isinstance(last, slice) and last == slice(None) and len(keys) > 1:
        return tokens_move(call, "tokens are dropped")
    if isinstance(last, slice):
        return LipschitzMap(
            constant=1.0, theorem="entries are dropped", exact=True, range=_about_origin(call)
        )
    # Without the last axis, entries of different tokens share a token.
    merged = call.shape[-1] if call.shape else 1
    if call.norm == "token" and merged is None:
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(
        constant=layer_constants.regroup_constant(call.norm, merged or 1),
        theorem="entries are dropped",
        range=entries_range(call),
    )


def _picked(operation, call: LayerCall) -> LipschitzMap:
    """The map of indexing with constant arrays."""
    key = call.argument("key")
    if any(isinstance(leaf, TensorState) for leaf in keras.tree.flatten(key)):
        return unbounded("its indices are not constants of the model")
    return copies(call, lambda x: operation.call(x, key), "entries by constant indices")


def _about_origin(call: LayerCall) -> TokenRange:
    return call.state.range.about_origin()


@register_operation("Split", "ArraySplit", "Hsplit", "Vsplit", "Dsplit", "Unstack")
def split(operation, call):
    name = type(operation).__name__
    rank = call.state.rank
    given = {"Hsplit": 1, "Vsplit": 0, "Dsplit": 2}
    axis = (given[name] if name in given else operation.axis) % rank
    if axis == 0:
        return unbounded(MOVES_BATCH)
    if axis == rank - 1 and name == "Unstack":
        # Entries of different tokens share a token.
        merged = call.shape[-1] if call.shape else 1
        if call.norm == "token" and merged is None:
            return unbounded(UNKNOWN_TOKENS)
        return LipschitzMap(
            constant=layer_constants.regroup_constant(call.norm, merged or 1),
            theorem="entries are dropped",
            range=entries_range(call),
        )
    if axis == rank - 1:
        return LipschitzMap(
            constant=1.0, theorem="entries are dropped", exact=True, range=_about_origin(call)
        )
    return tokens_move(call, "tokens are dropped")


@register_operation("Flip", "Roll")
def flip(operation, call):
    axes, refusal = reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    if call.state.rank - 1 in axes:
        return LipschitzMap(
            constant=1.0, theorem="entries move", exact=True, range=_about_origin(call)
        )
    return tokens_move(call)


@register_operation("Pad")
def pad(operation, call):
    rank = call.state.rank
    widths = [tuple(np.broadcast_to(width, 2)) for width in operation.pad_width]
    if len(widths) == 1:
        widths = widths * rank
    if len(widths) != rank or widths[0] != (0, 0):
        return unbounded("it pads the batch axis", cause=Cause.BATCH)
    if operation.mode != "constant":
        return copies(call, operation.call, "each entry repeated")
    value = call.argument("constant_values")
    if isinstance(value, TensorState):
        return unbounded("it pads with a value that is not a constant of the model")
    if value not in (None, 0, 0.0):
        largest = max(abs(float(value)), call.state.range.largest)
        return LipschitzMap(
            constant=1.0,
            theorem="constants are added",
            exact=True,
            range=TokenRange.up_to(largest, call.width),
        )
    return (TokenMixing if widths[-1] == (0, 0) else LipschitzMap)(
        constant=1.0, theorem="zeros are added", exact=True, range=_about_origin(call)
    )


@register_operation("Repeat", "Tile", "BroadcastTo")
def repeat(operation, call):
    name = type(operation).__name__
    state = call.state
    if name == "Repeat" and not isinstance(operation.repeats, int):
        return unbounded("it repeats some entries more often than others")
    if name == "Tile":
        repeats = np.ravel(operation.repeats)
        if len(repeats) > state.rank or (len(repeats) == state.rank and repeats[0] != 1):
            return unbounded(MOVES_BATCH)
    if name == "BroadcastTo" and (state.fold != call.fold or state.rank != call.rank):
        return unbounded(MOVES_BATCH)
    if state.entries is None or None in call.shape or any(state.dynamic) or any(call.dynamic):
        return unbounded("the number of times it repeats an entry is not known", cause=Cause.SIZE)
    times = call.fold * product(call.shape) / (state.fold * state.entries)
    old, new = (shape[-1] if shape else 1 for shape in (state.shape, call.shape))
    constant = 1.0
    if call.norm == "l2":
        constant = SAFETY * math.sqrt(times)
    elif call.norm == "token" and new > old:
        constant = SAFETY * math.sqrt(new / old)
    return LipschitzMap(
        constant=constant, theorem="each entry repeated", exact=True, range=entries_range(call)
    )
