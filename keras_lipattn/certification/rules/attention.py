"""Dot-product attention: Lipschitz only on bounded tokens (docs/theory.md, section 7)."""

import dataclasses
import math
import re

import keras
import numpy as np
from keras.src.layers.attention import multi_head_attention as multi_head_attention_module

from keras_lipattn.bounds.compact import (
    CrossConstants,
    additive_attention_constants,
    combine_heads,
    cross_attention_constants,
    dot_product_constants,
    dot_product_layer_constant,
)
from keras_lipattn.certification.class_code import changes_of
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.reasons import (
    BIAS_ELSEWHERE,
    JOIN_TOKENS,
    NOT_FINITE,
    RETURNS_SCORES,
    UNBOUNDED_TOKENS,
    UNKNOWN_TOKENS,
    Cause,
    in_training,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.averaging import averages, values_range
from keras_lipattn.certification.rules.linear import quantized
from keras_lipattn.certification.rules.lipschitz_layers import (
    attention_length,
    attention_mask_class,
    is_self_attention,
)
from keras_lipattn.certification.rules.merging import operands_of
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import (
    adds_bias_elsewhere,
    bias_of,
    cast_to_compute_dtype,
    kernel_of,
)
from keras_lipattn.linalg import SAFETY, operator_norm


@register_rule(keras.layers.MultiHeadAttention)
def multi_head_attention(layer, call):
    if layer._use_gate:
        return unbounded("its gate multiplies two functions of the input")
    if call.argument("return_attention_scores"):
        return unbounded(RETURNS_SCORES)
    if call.training and layer._dropout > 0.0:
        return unbounded(in_training("it draws random numbers"))
    changed = _changed_part(layer)
    if changed:
        return unbounded(changed, remedy=_KEEP_PARTS)
    parts = [layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense]
    for part in parts:
        refusal = quantized(part)
        if refusal is not None:
            return refusal
    if _adds_bias_elsewhere(parts, call):
        return unbounded(BIAS_ELSEWHERE)
    if not is_self_attention(call):
        return _of_three(layer._inverse_sqrt_key_dim, parts, call)
    mask = attention_mask_class(call)
    before = call.state.range
    if not before.bounded:
        return unbounded(UNBOUNDED_TOKENS)
    window = layer._sliding_window
    masks = [call.argument(f"{name}_mask") for name in ("query", "value", "key")]
    padded = bool(call.keras_masks) or call.mask is not None
    padded = padded or any(mask is not None for mask in masks)
    empty_rows = padded or _has_empty_row(mask, window)
    if not isinstance(mask, str) or window is not None or padded:
        # A padded query may see any set of keys.
        mask = "any"
    # In rows that see no key, the fused kernel of Keras for one axis of attention averages over all
    # keys. Without the fused kernel these rows have zero weights.
    fused = not layer._dropout > 0.0 and len(call.state.shape) == 2
    n_queries = None if window is None or (empty_rows and fused) else 2 * window - 1
    tokens = attention_length(layer._attention_axes, call.state)
    if tokens is None:
        return unbounded(UNKNOWN_TOKENS)
    # (heads, features, size): the heads of the kernels come first.
    query, key, value = (np.moveaxis(kernel_of(part), 1, 0) for part in parts[:3])
    output = kernel_of(parts[3])
    output = output.reshape(*output.shape[:2], -1)
    bias = bias_of(parts[0])
    if not all(np.isfinite(kernel).all() for kernel in (query, key, value, output)):
        return unbounded(NOT_FINITE)
    center = np.zeros(query.shape[1]) if before.center is None else before.center
    reduced = [_reduce(q, k, center) for q, k in zip(query, key, strict=True)]
    per_head = [
        dot_product_constants(
            q,
            k,
            radius=before.radius,
            tokens=tokens,
            mask=mask,
            scale=layer._inverse_sqrt_key_dim,
            center=c,
            query_bias=None if bias is None else bias[head],
            n_queries=n_queries,
        )
        for head, (q, k, c) in enumerate(reduced)
    ]
    norm = "l2" if call.norm == "l2" else "token"
    constants = [getattr(head, norm) for head in per_head]
    # V = Q R with orthonormal columns Q: the norm of V O is that of R O.
    mixed = np.stack([np.linalg.qr(v, mode="r") @ o for v, o in zip(value, output, strict=True)])
    constant, theorem = combine_heads(mixed, constants), "Theorem 7.1"
    together = dot_product_layer_constant(
        query,
        key,
        value,
        output,
        norm=norm,
        axes=before.axes(query.shape[1]),
        tokens=tokens,
        mask=mask,
        scale=layer._inverse_sqrt_key_dim,
        center=center,
        query_bias=bias,
        n_queries=n_queries,
    )
    if together < constant:
        constant, theorem = together, "Theorem 7.4"
    sizes = operator_norm(mixed)
    if call.norm == "linf":
        # |x| <= sqrt(D) max|x| on the way in, and max|y| <= |y| on the way out.
        constant *= SAFETY * math.sqrt(query.shape[1])
    published = math.nan
    if call.norm == "l2":
        published = _published(reduced, sizes, before, tokens, layer)
    return LipschitzMap(
        constant=constant,
        theorem=f"{theorem}, tokens in a ball of radius {before.radius:.4g}",
        reason="its constants overflow" if math.isinf(constant) else "",
        published=published,
        range=values_range(
            value,
            output,
            bias_of(parts[2]),
            bias_of(parts[3]),
            sizes,
            before,
            zero_rows=empty_rows and not fused,
        ),
        # Query, value and key are one tensor.
        operands=(call.state,),
    )


def _reduce(query: np.ndarray, key: np.ndarray, center: np.ndarray):
    """Kernels and center in a basis of the span of the kernels' columns."""
    basis, joint = np.linalg.qr(np.concatenate([query, key], axis=1))
    return joint[:, : query.shape[1]], joint[:, query.shape[1] :], center @ basis


def _has_empty_row(mask, window: int | None) -> bool:
    """Whether a query may see no key, for a class of masks or an array of visible pairs."""
    if isinstance(mask, str):
        return mask == "any"
    if window is not None:
        length = mask.shape[-1]
        lag = np.subtract.outer(np.arange(length), np.arange(length))
        mask = mask & (np.abs(lag) < window)
    return not mask.any(axis=-1).all()


def _published(reduced, sizes, before: TokenRange, tokens: int, layer) -> float:
    """The bound of Castin, Ablin and Peyre, "How smooth is attention?", summed over the heads."""
    biases = [bias_of(layer._query_dense), bias_of(layer._key_dense)]
    if any(bias is not None and np.any(bias) for bias in biases):
        return math.inf
    square = before.outer_radius**2
    total = 0.0
    for size, (query, key, _) in zip(sizes, reduced, strict=True):
        score = layer._inverse_sqrt_key_dim * operator_norm(key @ query.T) * square
        total += size * math.sqrt(3.0 * (score**2 * (4 * tokens + 1) + tokens))
    return SAFETY * total


@register_rule(keras.layers.GroupQueryAttention)
def group_query_attention(layer, call):
    if layer.use_gate:
        return unbounded("its gate multiplies two functions of the input")
    if call.argument("return_attention_scores"):
        return unbounded(RETURNS_SCORES)
    if call.training and layer.dropout > 0.0:
        return unbounded(in_training("it draws random numbers"))
    changed = _changed_part(layer)
    if changed:
        return unbounded(changed, remedy=_KEEP_PARTS)
    parts = [layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense]
    for part in parts:
        refusal = quantized(part)
        if refusal is not None:
            return refusal
    if _adds_bias_elsewhere(parts, call):
        return unbounded(BIAS_ELSEWHERE)
    return _of_three(layer._inverse_sqrt_head_dim, parts, call, repeats=layer.num_repeats)


# The layers inside an attention layer of Keras; for projections, how many axes they contract.
_PARTS = {
    "_query_dense": (keras.layers.EinsumDense, 1),
    "_key_dense": (keras.layers.EinsumDense, 1),
    "_value_dense": (keras.layers.EinsumDense, 1),
    "_output_dense": (keras.layers.EinsumDense, 2),
    "_softmax": (keras.layers.Softmax, 0),
    "_dropout_layer": (keras.layers.Dropout, 0),
}
_KEEP_PARTS = "use the layer as Keras builds it, or give a subclass a rule by `register_rule`"


def _changed_part(layer) -> str:
    """The reason why a part of an attention layer is not the one of Keras, or an empty string."""
    for name, (cls, contracted) in _PARTS.items():
        part = getattr(layer, name)
        if type(part) is not cls:
            return f"its part `{name}` is a {type(part).__name__}, not the {cls.__name__} of Keras"
        changes = changes_of(part)
        if not changes and contracted and not _is_projection(part, contracted):
            changes = "it is not a linear map of the features"
        if changes:
            return f"its part `{name}` was changed: {changes}"
    equations = layer._dot_product_equation, layer._combine_equation
    if (*equations, layer._softmax.axis) != _scores_of(layer):
        return "its scores were changed: their equations or the axis of their softmax"
    return ""


def _scores_of(layer) -> tuple:
    """The equations of the scores and the axis of the softmax that Keras builds a layer with."""
    if isinstance(layer, keras.layers.GroupQueryAttention):
        return "bquh,bkuh->buqk", "buqk,bkuh->bquh", -1
    rank = len(layer._query_dense.equation.partition("->")[2])
    axes = layer._attention_axes
    *equations, scores = multi_head_attention_module._build_attention_equation(rank, axes)
    return *equations, tuple(range(scores - len(axes), scores))


def _is_projection(part: keras.layers.EinsumDense, contracted: int) -> bool:
    """Whether it has no activation and contracts that many last axes of its input."""
    inputs, kernel, output = re.split(",|->", part.equation)
    kept, new = inputs[:-contracted], kernel[contracted:]
    letters = inputs + new
    shape = None if part.bias is None else tuple(part.bias.shape)
    return (
        part.activation in (None, keras.activations.linear)
        and len(set(letters)) == len(letters)
        and kernel == inputs[-contracted:] + new
        and output == kept + new
        and shape in (None, tuple(part.kernel.shape[contracted:]))
    )


def _adds_bias_elsewhere(parts, call: LayerCall) -> bool:
    """Whether a projection of heads `(heads, size)` may get its bias along the tokens."""
    for part, name in zip(parts[:3], ("query", "key", "value"), strict=True):
        bias, tensor = bias_of(part), call.argument(name)
        # The key is the value by default.
        state = call.operand(call.argument("value") if tensor is None else tensor)
        if bias is not None and adds_bias_elsewhere(bias, (None, *state.shape[:-1], *bias.shape)):
            return True
    return adds_bias_elsewhere(bias_of(parts[3]), (None, *call.shape))


def _of_three(scale: float, parts, call: LayerCall, *, repeats: int = 1) -> LipschitzMap:
    """Attention of several heads on a query, a key and a value that may be different tensors."""
    tensors = [call.argument(name) for name in ("query", "key", "value")]
    query, key, value = tensors[0], tensors[2] if tensors[1] is None else tensors[1], tensors[2]
    states = [call.operand(tensor) for tensor in (query, key, value)]
    if any(len(state.shape) + (state.fold > 0) != 3 for state in states) or call.rank != 3:
        return unbounded(
            "attention between different tensors has a rule only for one axis of tokens",
            remedy=JOIN_TOKENS,
        )
    # (heads, features, size): the heads of the kernels come first.
    kernels = [np.moveaxis(kernel_of(part), 1, 0) for part in parts[:3]]
    # Heads that share keys and values.
    kernels[1:] = [np.repeat(kernel, repeats, axis=0) for kernel in kernels[1:]]
    output = kernel_of(parts[3])
    output = output.reshape(*output.shape[:2], -1)
    if not all(np.isfinite(kernel).all() for kernel in (*kernels, output)):
        return unbounded(NOT_FINITE)
    balls = [_ball(state) for state in states]
    constants = cross_attention_constants(
        kernels[0],
        kernels[1],
        query_radius=balls[0].radius,
        key_radius=balls[1].radius,
        value_radius=balls[2].radius,
        scale=scale,
        query_center=balls[0].center,
        query_bias=bias_of(parts[0]),
    )
    # V = Q R with orthonormal columns Q: the norm of V O is that of R O.
    mixed = np.stack(
        [np.linalg.qr(v, mode="r") @ o for v, o in zip(kernels[2], output, strict=True)]
    )
    token_range = None
    if balls[2].bounded:
        inner = bias_of(parts[2])
        inner = None if inner is None else np.repeat(inner, repeats, axis=0)
        outer = bias_of(parts[3])
        sizes = operator_norm(mixed)
        # A query that sees no key gets zeros or an average, depending on the kernel of Keras.
        token_range = values_range(
            kernels[2], output, inner, outer, sizes, balls[2], zero_rows=True
        )
    return averages(
        CrossConstants(*(combine_heads(mixed, part) for part in constants)),
        states,
        call,
        token_range,
    )


def _ball(state: TensorState) -> TokenRange:
    """A ball that contains the tokens of a tensor."""
    known = state.range
    if known.bounded or state.width is None or not math.isfinite(known.largest):
        return known
    return TokenRange(SAFETY * math.sqrt(state.width) * known.largest, None, known.largest)


@register_rule(keras.layers.Attention, keras.layers.AdditiveAttention)
def plain_attention(layer, call):
    if call.argument("return_attention_scores"):
        return unbounded(RETURNS_SCORES)
    if call.training and layer.dropout > 0.0:
        return unbounded(in_training("it draws random numbers"))
    states = operands_of(call, "inputs")
    query, value = states[:2]
    key = states[2] if len(states) > 2 else value
    width = query.width
    if width is None or call.rank < 3 or any(state.rank != call.rank for state in states):
        return unbounded("the sizes of its tensors are not known, or differ")
    if any(state.shape[-len(query.shape) : -2] != query.shape[:-2] for state in (key, value)):
        return unbounded("it repeats a tensor along an axis")
    radius = _ball(value).radius
    scale = getattr(layer, "scale", None)
    scale = np.ones(()) if scale is None else cast_to_compute_dtype(scale, layer.compute_dtype)
    additive = isinstance(layer, keras.layers.AdditiveAttention)
    if not additive and layer.score_mode == "concat":
        scale = scale * cast_to_compute_dtype(layer.concat_score_weight, layer.compute_dtype)
    if not np.isfinite(scale).all():
        return unbounded(NOT_FINITE)
    if additive or layer.score_mode == "concat":
        constants = additive_attention_constants(
            np.broadcast_to(scale, (width,)), value_radius=radius
        )
        theorem = "Theorem 7.7, values in a ball"
    else:
        constants = _dot_products([query, key, value], float(scale))
        theorem = "Theorem 7.7, tokens in balls"
    return averages(constants, [query, key, value], call, _averaged(value), theorem)


def _dot_products(states: list[TensorState], scale: float) -> CrossConstants:
    """The constants for the logits `scale x . y`."""
    query, key, value = map(_ball, states)
    width = states[0].width or 1
    identity = np.eye(width)[None]
    center = None if query.center is None else np.broadcast_to(query.center, (width,))
    constants = cross_attention_constants(
        identity,
        identity,
        query_radius=query.radius,
        key_radius=key.radius,
        value_radius=value.radius,
        scale=scale,
        query_center=center,
    )
    return CrossConstants(*(float(part[0]) for part in constants))


def _averaged(value: TensorState) -> TokenRange | None:
    """The range of averages of tokens, and of zeros for queries that see no key."""
    ball = _ball(value)
    if not ball.bounded or value.width is None:
        return None
    return TokenRange(ball.radius, ball.center, ball.largest).including(np.zeros(value.width))


@register_operation("DotProductAttention")
def dot_product_attention(operation, call):
    if operation.attn_logits_soft_cap is not None:
        return unbounded("attention with a soft cap on its logits has no rule", cause=Cause.NO_RULE)
    scale, bias = call.argument("scale"), call.argument("bias")
    if isinstance(scale, TensorState) or (isinstance(bias, TensorState) and not bias.is_fixed):
        return unbounded("its scale or its bias changes with the input")
    states = operands_of(call, "query", "key", "value")
    query, key, value = states
    if query.width is None or any(state.rank != 4 for state in states):
        return unbounded("the sizes of its tensors are not known, or differ")
    if not query.shape[-2] == key.shape[-2] == value.shape[-2]:
        return unbounded("some of its heads share keys and values")
    scale = 1.0 / math.sqrt(query.width) if scale is None else float(call.constant(scale))
    constants = _dot_products(states, scale)
    # Axes are (batch, tokens, heads, features), and heads are separate sequences.
    swapped = dataclasses.replace(call, shape=(call.shape[1], call.shape[0], call.shape[2]))
    return averages(constants, states, swapped, _averaged(value))
