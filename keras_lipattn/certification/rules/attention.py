"""Ordinary attention: Lipschitz only where its tokens are bounded (docs/theory.md, section 7)."""

import math

import keras
import numpy as np

from keras_lipattn.bounds.compact import combine_heads, dot_product_constants
from keras_lipattn.bounds.compact_layer import dot_product_layer_constant
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.linear import NOT_FINITE, quantized
from keras_lipattn.certification.rules.lipschitz_layers import (
    attention_length,
    attention_mask_class,
    tokens_of_attention,
)
from keras_lipattn.certification.rules.other_layers import RUNS_AS_IN_TRAINING
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import bias_of, kernel_of
from keras_lipattn.linalg import SAFETY, operator_norm


@register_rule(keras.layers.MultiHeadAttention)
def multi_head_attention(layer, call):
    if len(tokens_of_attention(call)) != 1:
        return unbounded("only self-attention has a rule")
    if layer._use_gate:
        return unbounded("its gate multiplies two functions of the input")
    if call.argument("return_attention_scores"):
        return unbounded("it also returns its attention scores, for which no bound is known")
    if call.training and layer._dropout > 0.0:
        return unbounded(f"{RUNS_AS_IN_TRAINING}: it draws random numbers")
    parts = [layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense]
    for part in parts:
        refusal = quantized(part)
        if refusal is not None:
            return refusal
    mask = attention_mask_class(call)
    before = call.state.range
    if not before.bounded:
        return unbounded("dot-product attention is not Lipschitz where its tokens are unbounded")
    window = layer._sliding_window
    masks = [call.argument(f"{name}_mask") for name in ("query", "value", "key")]
    padded = bool(call.keras_masks) or call.mask is not None
    padded = padded or any(mask is not None for mask in masks)
    empty_rows = padded or _has_empty_row(mask, window)
    if not isinstance(mask, str) or window is not None or padded:
        # A padded query may look at keys in any way.
        mask = "any"
    # Keras has a fused kernel for one axis of attention; it averages over all keys in rows that
    # see none. Without it these rows get zero weights.
    fused = not layer._dropout > 0.0 and len(call.state.shape) == 2
    n_queries = None if window is None or (empty_rows and fused) else 2 * window - 1
    tokens = attention_length(layer._attention_axes, call.state)
    if tokens is None:
        return unbounded("its number of tokens is not known: pass `sequence_length`")
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
        range=_values(value, output, parts, sizes, before, zero_rows=empty_rows and not fused),
        # Query, value and key are one tensor.
        operands=(call.state,),
    )


def _reduce(query: np.ndarray, key: np.ndarray, center: np.ndarray):
    """Kernels and center in the span of the kernels' columns: products between them stay."""
    basis, joint = np.linalg.qr(np.concatenate([query, key], axis=1))
    return joint[:, : query.shape[1]], joint[:, query.shape[1] :], center @ basis


def _has_empty_row(mask, window: int | None) -> bool:
    """Whether some query may see no key, for a class of masks or an array of visible pairs."""
    if isinstance(mask, str):
        return mask == "any"
    if window is not None:
        length = mask.shape[-1]
        lag = np.subtract.outer(np.arange(length), np.arange(length))
        mask = mask & (np.abs(lag) < window)
    return not mask.any(axis=-1).all()


def _values(value, output, parts, sizes, before: TokenRange, *, zero_rows: bool) -> TokenRange:
    """Averages of tokens stay in the ball; each head maps them linearly.

    With `zero_rows` a head may give zero instead.
    """
    width = output.shape[-1]
    center = np.zeros(value.shape[1]) if before.center is None else before.center
    inner, outer = bias_of(parts[2]), bias_of(parts[3])
    moved = TokenRange(0.0) if outer is None else TokenRange(0.0, outer.reshape(-1))
    for head, size in enumerate(sizes):
        image = center @ value[head] + (0.0 if inner is None else inner[head])
        reached = TokenRange(SAFETY * float(size) * before.radius, image @ output[head])
        moved = moved.plus(reached.including(np.zeros(width)) if zero_rows else reached)
    return moved


def _published(reduced, sizes, before: TokenRange, tokens: int, layer) -> float:
    """Castin, Ablin and Peyre, "How smooth is attention?": a sum over heads without biases."""
    biases = [bias_of(layer._query_dense), bias_of(layer._key_dense)]
    if any(bias is not None and np.any(bias) for bias in biases):
        return math.inf
    square = before.outer_radius**2
    total = 0.0
    for size, (query, key, _) in zip(sizes, reduced, strict=True):
        score = layer._inverse_sqrt_key_dim * operator_norm(key @ query.T) * square
        total += size * math.sqrt(3.0 * (score**2 * (4 * tokens + 1) + tokens))
    return SAFETY * total


@register_rule(
    keras.layers.AdditiveAttention, keras.layers.Attention, keras.layers.GroupQueryAttention
)
def other_attention(layer, call):
    return unbounded("this kind of attention has no bound here")


@register_operation("DotProductAttention")
def dot_product_attention(operation, call):
    return unbounded("dot-product attention on free tensors is not Lipschitz")
