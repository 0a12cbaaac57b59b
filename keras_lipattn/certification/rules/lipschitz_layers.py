"""The layers of this package, which know their own constants."""

import dataclasses
import math
from typing import Any

import numpy as np

from keras_lipattn.bounds.bounded_tokens import projection_constant
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.unit_head import no_smaller_norms
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import CenterValue, LipschitzMap, unbounded
from keras_lipattn.certification.reasons import (
    JOIN_TOKENS,
    MOVES_BATCH,
    RETURNS_SCORES,
    Cause,
    Reason,
    in_training,
    inner_reason,
)
from keras_lipattn.certification.registry import find_rule, register_own_bound, register_rule
from keras_lipattn.certification.rules.averaging import keeps_batch, values_range
from keras_lipattn.certification.rules.local_attention import (
    near_input,
    product_near_input,
    projected,
)
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import cast_to_compute_dtype
from keras_lipattn.layers import (
    BoundedMultiHeadAttention,
    ContinuousDepth,
    InvertibleResidual,
    InvertibleSequential,
    L2MultiHeadAttention,
    ScaledCosineAttention,
    SelfAttention,
    TokenProjection,
)
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer
from keras_lipattn.layers.token_projection import inner_radius
from keras_lipattn.linalg import SAFETY, operator_norm


@register_own_bound
@register_rule(LipschitzLayer, subclasses=True)
def lipschitz_layer(layer, call):
    """The map of a layer with a method `lipschitz` that returns a `LipschitzBound`."""
    if call.training:
        return unbounded(in_training())
    bound = layer.lipschitz(
        sequence_length=call.state.tokens,
        norm=call.norm,
        mask="full" if call.mask is None else call.mask,
    )
    if not isinstance(bound, LipschitzBound) or bound.kind != "certified":
        return unbounded("its method `lipschitz` does not return a certified `LipschitzBound`")
    return LipschitzMap(
        constant=bound.value,
        published=bound.published if math.isfinite(bound.published) else math.nan,
        theorem=bound.theorem,
        reason=_reason(bound, call.state.tokens),
        max_tokens=call.state.tokens if any(call.state.dynamic) else None,
    )


@register_rule(L2MultiHeadAttention, ScaledCosineAttention, BoundedMultiHeadAttention)
@register_rule(SelfAttention, subclasses=True)
def self_attention(layer, call):
    changed = [name for name in _RUNS if _is_overridden(layer, name)]
    if changed:
        return unbounded(f"it overrides `{', '.join(changed)}` of SelfAttention")
    if isinstance(layer, BoundedMultiHeadAttention) and layer.token_radius is None:
        return unbounded("its `token_radius` was removed", remedy="use a layer that has one")
    if call.argument("return_attention_scores"):
        return unbounded(RETURNS_SCORES)
    if call.training and (layer.dropout > 0.0 or layer.has_caps):
        return unbounded(in_training("it uses dropout or running norms"))
    if not is_self_attention(call):
        if layer.token_radius is not None:
            return _between_tensors(layer, call)
        return unbounded("query, value and key are different tensors", remedy=JOIN_TOKENS)
    mask = attention_mask_class(call)
    if call.argument("token_weights") is not None:
        return _weighted(layer, call, mask)
    tokens = attention_length(layer.attention_axes, call.state)
    known, most = layer.mask_and_length(tokens, call.norm, mask)
    # The cap at inference depends on the mask of the call, not on the masks of the certificate.
    given = call.argument("attention_mask")
    cap_mask = layer.cap_mask_class(given, bool(call.argument("use_causal_mask")))
    if given is not None and known.mask == "any" and known.cliques is None:
        known = known.intersect(cap_mask)
    options = {}
    if isinstance(layer, BoundedMultiHeadAttention):
        options["ball"] = _projected_ball(layer, layer.token_radius, call.state)
    bound = layer.certified(call.norm, known, most, cap_mask, **options)
    layer_map = LipschitzMap(
        constant=bound.value,
        # `inf` also means that it was not evaluated.
        published=bound.published if isinstance(layer, L2MultiHeadAttention) else math.nan,
        theorem=bound.theorem,
        reason=_reason(bound, tokens),
        # Query, value and key are one tensor.
        operands=(call.state,),
        # Without a length in the graph the layer used its own.
        max_tokens=_longest(layer, tokens, call.state),
        range=_attended(layer, call) if math.isfinite(bound.value) else None,
        larger_in=_larger_in(layer, call.norm, known, most),
    )
    if isinstance(layer, BoundedMultiHeadAttention):
        return product_near_input(layer, call, layer_map, cap_mask)
    # Theorem 6 is for attention by distance.
    return (
        near_input(layer, call, layer_map, mask)
        if isinstance(layer, L2MultiHeadAttention)
        else layer_map
    )


# The methods of `SelfAttention` around those that a subclass writes.
_RUNS = (
    "__call__",
    "call",
    "call_with_weights",
    "effective_weights",
    "mask_of_call",
    "shape_outputs",
)


def _is_overridden(layer: SelfAttention, name: str) -> bool:
    """Whether a subclass outside this package overrides a method."""
    return not getattr(type(layer), name).__module__.startswith("keras_lipattn.")


def is_self_attention(call: LayerCall) -> bool:
    """Whether value and key, as far as they are given, are the query. Constants are not."""
    query = call.argument("query")
    others = [call.argument(name) for name in ("value", "key")]
    return all(other is None or other is query for other in others)


def _between_tensors(layer, call: LayerCall) -> LipschitzMap:
    """The map of attention on bounded tokens between different tensors."""
    tensors = [call.argument(name) for name in ("query", "value", "key")]
    tensors[1] = tensors[0] if tensors[1] is None else tensors[1]
    tensors[2] = tensors[1] if tensors[2] is None else tensors[2]
    names = ["query", "value"] if tensors[2] is tensors[1] else ["query", "value", "key"]
    operands = [call.operand(tensor) for tensor in tensors[: len(names)]]
    if not keeps_batch(operands, call):
        return unbounded(MOVES_BATCH)
    queries = attention_length(layer.attention_axes, operands[0])
    given, causal = call.argument("attention_mask"), bool(call.argument("use_causal_mask"))
    mask = layer.cap_mask_class(given, causal, tensors=len(names))
    parts = layer.cross_certified(call.norm, mask, queries, mask)
    gains = [0.0 if o.is_fixed else parts[n].value for n, o in zip(names, operands, strict=True)]
    joint = layer.certified(call.norm, mask, queries, mask)
    total = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
    constant = min(SAFETY * total, joint.value)
    reason = _reason(joint, queries) if math.isinf(constant) else Reason()
    return LipschitzMap(
        constant=constant,
        theorem=parts[names[0]].theorem,
        reason=reason,
        operands=tuple(operands),
        per_input=tuple(gains),
        max_tokens=_longest(layer, queries, operands[0]) if operands[0].fold else None,
        range=_attended(layer, call) if math.isfinite(constant) else None,
    )


def _projected_ball(layer, radius: float, state: TensorState) -> tuple[np.ndarray, float] | None:
    """Center and radius of a ball of projected tokens, `None` if it is not smaller than `radius`.

    The projection does not enlarge distances, so it maps a ball into one of its radius.
    """
    before, width = state.range, state.width
    if not before.bounded or width is None:
        return None
    center = np.zeros(width) if before.center is None else before.center
    center = np.broadcast_to(center, (width,))
    center = center * min(1.0, radius / max(float(np.linalg.norm(center)), radius))
    # What runs projects onto a ball that is a little smaller.
    reach = before.radius + radius - inner_radius(radius, width, layer.compute_dtype)
    return (center, SAFETY * reach) if SAFETY * reach < radius else None


def _reason(bound: LipschitzBound, tokens: int | None) -> Reason:
    """The reason of a layer's own bound, which may only lack the number of tokens."""
    return Reason(bound.reason, cause=Cause.SIZE if tokens is None else Cause.LAYER)


def _attended(layer, call: LayerCall) -> TokenRange | None:
    """The range of the output: heads map averages of tokens (unit vectors for cosines) linearly.

    Caps do not enlarge it. Padded tokens give zeros.
    """
    if layer.is_condensed or layer.compute_dtype not in ("float32", "float64"):
        return None
    if isinstance(layer, BoundedMultiHeadAttention):
        return _attended_products(layer, call)
    if isinstance(layer, L2MultiHeadAttention):
        reach = call.state.range.outer_radius
        if layer.token_radius is not None:
            reach = layer.token_radius
        if not math.isfinite(reach):
            return None
        kernels = layer.host_kernels()
        kernels[0] = kernels[0] * layer.key_dim**-0.25
        query, value, output = layer.by_head(kernels, np)
        if not all(np.isfinite(kernel).all() for kernel in (query, value, output)):
            return None
        # query = Q R with orthonormal columns Q: the norm of query M is that of R M.
        triangle = np.linalg.qr(query, mode="r")
        heads = triangle @ (np.swapaxes(query, 1, 2) @ value @ output)
    elif isinstance(layer, ScaledCosineAttention):
        heads = layer.host_kernels()[3]
        heads = heads.reshape(*heads.shape[:2], -1)
        reach = 1.0
    else:
        return None
    if not np.isfinite(heads).all():
        return None
    radius = SAFETY * float(np.sum(operator_norm(heads))) * reach
    bias = layer.output_bias
    shift = np.zeros(heads.shape[2])
    if bias is not None:
        shift = np.ravel(cast_to_compute_dtype(bias, layer.compute_dtype))
    if call.width != len(shift):
        # An output token has several axes.
        return TokenRange.up_to(radius + float(np.abs(shift).max()), call.width)
    return TokenRange(radius, shift).including(np.zeros(len(shift)))


def _attended_products(layer, call: LayerCall) -> TokenRange | None:
    """The same for attention by products: averages of values, or zero where no key is seen."""
    kernels = layer.host_kernels()
    value, output = np.moveaxis(kernels[2], 1, 0), kernels[3]
    output = output.reshape(*output.shape[:2], -1)
    repeats = len(output) // len(value)
    value = np.repeat(value, repeats, axis=0)
    inner, outer = (
        None if bias is None else cast_to_compute_dtype(bias, layer.compute_dtype)
        for bias in (layer.value_bias, layer.output_bias)
    )
    if not all(np.isfinite(array).all() for array in (value, output)):
        return None
    mixed = np.linalg.qr(value, mode="r") @ output
    sizes = np.asarray(operator_norm(mixed))
    inner = None if inner is None else np.repeat(inner, repeats, axis=0)
    ball = TokenRange(layer.token_radius)
    moved = values_range(value, output, inner, outer, sizes, ball, zero_rows=True)
    if call.width != output.shape[-1]:
        # An output token has several axes.
        return TokenRange.up_to(moved.outer_radius, call.width)
    # A cap shrinks what is added to the bias, and padded tokens give zeros.
    if outer is not None:
        moved = moved.including(np.ravel(outer))
    return moved.including(np.zeros(output.shape[-1]))


def _weighted(layer, call: LayerCall, mask) -> LipschitzMap:
    """The map of attention with constant token weights."""
    weights = call.argument("token_weights")
    if isinstance(weights, TensorState) or len(call.state.shape) > 2:
        return unbounded(
            "the weights of its tokens are not constants of the model, or an example has several "
            "sequences: only constant weights of a single sequence have a rule"
        )
    bound = layer.lipschitz(norm=call.norm, mask=mask, token_weights=call.constant(weights))
    return LipschitzMap(
        constant=bound.value, theorem=bound.theorem, reason=bound.reason, operands=(call.state,)
    )


def _longest(layer, tokens: int | None, state: TensorState) -> int | None:
    """The number of tokens up to which the constant holds, if the graph does not fix it."""
    if not any(state.dynamic):
        return None
    return layer.max_sequence_length if tokens is None else tokens


def attention_mask_class(call: LayerCall) -> Any:
    """The class of mask that an attention layer is called with.

    Args:
        call: the call; its masks are fixed.

    Returns:
        `"full"` (none, or padding), `"causal"`, `"any"` or an array of visible pairs.
    """
    causal = bool(call.argument("use_causal_mask"))
    given = call.argument("attention_mask")
    if given is None:
        if causal:
            return "causal"
        # The argument `mask` does not restrict masks that are known from the graph.
        return "any" if isinstance(call.mask, str) and call.mask == "any" else "full"
    pairs = given
    if isinstance(given, TensorState):
        if given.values is None:
            return _stated_class(call.mask, causal)
        pairs = given.values
    pairs = np.asarray(pairs, bool)
    # With several axes of tokens, only masks of rank 2 and 3 end in flattened tokens for certain.
    flattened = len(call.state.shape) == 2 or pairs.ndim <= 3
    square = pairs.ndim >= 2 and pairs.shape[-1] == pairs.shape[-2]
    # An axis of size 1 is broadcast and does not give pairs.
    if not flattened or not square or pairs.shape[-1] == 1:
        return "any"
    lower = np.tri(pairs.shape[-1], dtype=bool)
    if causal:
        pairs = np.logical_and(pairs, lower)
    if pairs.all():
        return "full"
    return "causal" if (pairs == lower).all() else pairs


def _larger_in(layer, norm: str, known, tokens: int | None) -> tuple[str, ...]:
    if not isinstance(layer, L2MultiHeadAttention) or layer.relative_bias is not None:
        return ()
    return no_smaller_norms(norm, layer.num_heads, tokens, **known.arguments(tokens))


def _stated_class(mask: Any, causal: bool) -> Any:
    """The class of a mask that `certify` is told, restricted to earlier tokens if `causal`."""
    if mask is None:
        return "any"
    if not causal:
        return mask
    if isinstance(mask, str):
        return "causal" if mask == "full" else mask
    pairs = np.asarray(mask, bool)
    square = pairs.ndim >= 2 and pairs.shape[-1] == pairs.shape[-2] > 1
    return np.logical_and(pairs, np.tri(pairs.shape[-1], dtype=bool)) if square else "any"


def attention_length(attention_axes, state: TensorState) -> int | None:
    """Largest number of tokens that attend to each other."""
    if attention_axes is None:
        return product(state.shape[:-1])
    rank = state.rank
    axes = attention_axes if isinstance(attention_axes, tuple | list) else (attention_axes,)
    return product(tuple(state.shape[axis % rank - 1] for axis in axes))


@register_rule(ContinuousDepth)
def continuous_depth(layer, call):
    refusal = _unknown_part([part for knot in layer._knots for part in knot.layers])
    if refusal is not None:
        return refusal
    # The constant is that of the integration steps.
    return _own_constant(layer.lipschitz(sequence_length=call.state.tokens, norm=call.norm), call)


@register_rule(InvertibleResidual, InvertibleSequential)
def invertible(layer, call):
    blocks = layer.layers if isinstance(layer, InvertibleSequential) else [layer]
    refusal = _unknown_part([*blocks, *(part for one in blocks for part in one._branch.layers)])
    if refusal is not None:
        return refusal
    # Their second terms are contractions by construction.
    layer_map = _own_constant(layer.lipschitz(norm=call.norm), call)
    most = layer.max_sequence_length if any(call.state.dynamic) else None
    return dataclasses.replace(layer_map, max_tokens=most)


def _unknown_part(parts: list) -> LipschitzMap | None:
    """The map of a layer with an inner layer that has no rule, `None` if all of them have one."""
    for part in parts:
        rule, missing = find_rule(part)
        if rule is None:
            remedy = "use a layer that has the methods `graph_bound` and `lipschitz`"
            return unbounded(inner_reason(part, Reason(missing, remedy=remedy)))
        if not rule.__module__.startswith("keras_lipattn."):
            return unbounded(inner_reason(part, "it has a rule of its own, which is not used here"))
    return None


def _own_constant(bound: LipschitzBound, call: LayerCall) -> LipschitzMap:
    if call.training:
        return unbounded(in_training())
    return LipschitzMap(
        constant=bound.value,
        theorem=bound.theorem,
        reason=_reason(bound, call.state.tokens),
        max_tokens=call.state.tokens if any(call.state.dynamic) else None,
    )


@register_rule(TokenProjection)
def token_projection(layer, call):
    width, before = call.state.width, call.state.range
    if width is None:
        return unbounded("the size of its last axis is not known", cause=Cause.SIZE)
    after = TokenRange(layer.radius)
    ball = _projected_ball(layer, layer.radius, call.state)
    if ball is not None:
        after = TokenRange(ball[1], ball[0] if ball[0].any() else None)
    largest = min(before.largest, layer.radius)
    near, center = call.state.enclosure, None
    if near is not None:
        center = CenterValue(value=projected(near.value, layer.radius, layer.compute_dtype))
    return LipschitzMap(
        constant=projection_constant(call.norm, width),
        theorem="projection onto a ball",
        exact=True,
        center=center,
        range=dataclasses.replace(after, largest=min(after.largest, largest)),
    )
