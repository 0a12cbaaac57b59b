"""Moving entries around: reshape, permute, pad, crop, repeat (docs/theory.md, section 8)."""

import dataclasses
import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.registry import register_operation, register_rule
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState, product
from keras_lipattn.linalg import SAFETY

_UNKNOWN = "the number of tokens it collects in one is not known: give `sequence_length`"


def regroup(call: Call, merged: int | None, theorem: str = "entries move") -> Step:
    """Entries move, and a new token takes them from at most `merged` old ones."""
    if call.norm == "token" and merged is None:
        return Step(constant=math.inf, reason=_UNKNOWN)
    constant = layer_constants.regroup_constant(call.norm, merged or 1)
    # A new token has at most `merged` old ones inside it.
    domain = None
    if merged is not None and call.state.domain.bounded:
        old = call.state.domain
        domain = Domain(SAFETY * math.sqrt(merged) * old.outer_radius, None, old.largest)
    return Step(constant=constant, theorem=theorem, exact=call.norm != "token", domain=domain)


def tokens_move(call: Call, theorem: str = "tokens move") -> Step:
    """Whole tokens move or vanish; the last axis stays as it is."""
    return Step(
        constant=1.0,
        theorem=theorem,
        exact=True,
        mixes_tokens=True,
        domain=call.state.domain,
    )


def reshape_step(state: TensorState, shape: tuple[int | None, ...], call: Call) -> Step:
    """A row-major reshape of `state` to `shape`."""
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
    if merged is not None and state.entries is not None and state.entries == product(shape):
        # Only then does the batch axis stay out of it, and the tokens are those of one example.
        merged = min(merged, state.tokens or merged)
    return regroup(call, merged)


@register_rule(keras.layers.Flatten)
def flatten(layer, call):
    return regroup(call, call.state.tokens, "all tokens in one")


@register_rule(keras.layers.Reshape)
def reshape(layer, call):
    return reshape_step(call.state, call.shape, call)


@register_operation("Reshape", "Ravel", "Squeeze", "ExpandDims")
def reshape_operation(operation, call):
    return reshape_step(call.state, call.shape, call)


def permute_step(order: tuple[int, ...], call: Call) -> Step:
    """A permutation of all axes; `order` includes the batch axis."""
    if order[0] != 0:
        return Step(constant=math.inf, reason="it moves the batch axis")
    if order[-1] == len(order) - 1:
        return tokens_move(call, "axes of tokens move")
    new_width = call.shape[-1] if call.shape else None
    return regroup(call, new_width, "axes move")


@register_rule(keras.layers.Permute)
def permute(layer, call):
    return permute_step((0, *layer.dims), call)


@register_operation("Transpose")
def transpose(operation, call):
    rank = len(call.state.shape) + 1
    axes = tuple(reversed(range(rank))) if operation.axes is None else operation.axes
    return permute_step(tuple(axis % rank for axis in axes), call)


@register_operation("Swapaxes")
def swapaxes(operation, call):
    order = list(range(len(call.state.shape) + 1))
    a, b = operation.axis1 % len(order), operation.axis2 % len(order)
    order[a], order[b] = order[b], order[a]
    return permute_step(tuple(order), call)


@register_operation("Moveaxis")
def moveaxis(operation, call):
    rank = len(call.state.shape) + 1
    labels = np.empty(tuple(range(2, 2 + rank)), bool)
    moved = np.moveaxis(labels, operation.source, operation.destination)
    order = [size - 2 for size in moved.shape]
    return permute_step(tuple(order), call)


@register_rule(keras.layers.RepeatVector)
def repeat_vector(layer, call):
    return repeated(call, layer.n)


def repeated(call: Call, times: int) -> Step:
    """Every token appears `times` times."""
    constant = SAFETY * math.sqrt(times) if call.norm == "l2" else 1.0
    return Step(
        constant=constant,
        theorem="each entry repeated",
        exact=True,
        mixes_tokens=True,
        domain=call.state.domain,
    )


@register_rule(keras.layers.UpSampling1D)
def up_sampling_1d(layer, call):
    return repeated(call, int(layer.size))


@register_rule(keras.layers.UpSampling2D, keras.layers.UpSampling3D)
def up_sampling(layer, call):
    interpolation = getattr(layer, "interpolation", "nearest")
    if interpolation != "nearest":
        return Step(constant=math.inf, reason=f"no rule for its interpolation {interpolation!r}")
    if layer.data_format == "channels_first":
        return spatial_last(repeated(call, math.prod(layer.size)), call)
    return repeated(call, math.prod(layer.size))


def spatial_last(step: Step, call: Call) -> Step:
    """The same layer when the last axis is one of the image.

    Entries that move or repeat within tokens still give each entry of the 2-norm and the max
    norm as often as before; a token may then repeat some entries.
    """
    if call.norm == "token":
        return Step(
            constant=math.inf,
            reason="in the token norm only the data format channels_last has a rule",
        )
    return dataclasses.replace(step, mixes_tokens=False, domain=None)


@register_rule(
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
)
def crop_or_pad(layer, call):
    step = Step(
        constant=1.0,
        theorem="entries are dropped or zeros added",
        exact=True,
        mixes_tokens=True,
        domain=call.state.domain.around_origin(),
    )
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return dataclasses.replace(step, mixes_tokens=False, domain=None)
    return step
