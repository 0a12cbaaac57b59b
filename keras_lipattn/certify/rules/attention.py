"""Ordinary attention: Lipschitz only where its tokens are bounded (docs/theory.md, section 7)."""

import math

import keras
import numpy as np

from keras_lipattn.bounds.compact import combine_heads, dot_product_constants
from keras_lipattn.bounds.compact_layer import dot_product_layer_constant
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.registry import register_operation, register_rule
from keras_lipattn.certify.rules.linear import NOT_FINITE, quantized
from keras_lipattn.certify.rules.lipschitz_layers import attention_length, attention_mask_class
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.certify.weights import bias_of, kernel_of
from keras_lipattn.linalg import SAFETY, operator_norm

_MASKED = ("query", "value", "key")


# Kernels whose products overflow have the constant `inf`.
@register_rule(keras.layers.MultiHeadAttention)
@np.errstate(over="ignore", invalid="ignore")
def multi_head_attention(layer, call):
    queries = [*call.args[:3], *map(call.kwargs.get, _MASKED)]
    tensors = {id(value): value for value in queries if isinstance(value, TensorState)}
    if len(tensors) != 1:
        return Step(constant=math.inf, reason="only self-attention has a rule")
    if layer._use_gate:
        return Step(constant=math.inf, reason="its gate multiplies two functions of the input")
    if call.kwargs.get("return_attention_scores"):
        return Step(
            constant=math.inf,
            reason="it also returns its attention scores, for which no bound is known",
        )
    if call.training and layer._dropout > 0.0:
        return Step(
            constant=math.inf,
            reason="the graph calls it with `training=True`: it draws random numbers at inference",
        )
    parts = [layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense]
    for part in parts:
        refusal = quantized(part)
        if refusal is not None:
            return refusal
    mask, refusal = attention_mask_class(call)
    if refusal is not None:
        return refusal
    domain = call.state.domain
    if not domain.bounded:
        return Step(
            constant=math.inf,
            reason="dot-product attention is not Lipschitz where its tokens are unbounded; a "
            "normalisation before it or `input_radius` bounds them",
        )
    window = layer._sliding_window
    given = mask
    padded = call.state.masked or call.mask is not None
    padded = padded or any(call.kwargs.get(f"{name}_mask") is not None for name in _MASKED)
    if not isinstance(mask, str) or window is not None or padded:
        # A padded query may look at keys in any way.
        mask = "any"
    empty_rows = padded or _has_empty_row(given, window)
    # Keras has a fused kernel for one axis of attention; it averages over all keys in rows that
    # see none. Without it these rows get zero weights.
    fused = not layer._dropout > 0.0 and len(call.state.shape) == 2
    n_queries = None if window is None or (empty_rows and fused) else 2 * window - 1
    tokens = attention_length(layer._attention_axes, call.state)
    if tokens is None:
        return Step(
            constant=math.inf, reason="its number of tokens is not known: give `sequence_length`"
        )
    # (heads, features, size): the heads of the kernels come first.
    query, key, value = (np.moveaxis(kernel_of(part), 1, 0) for part in parts[:3])
    output = kernel_of(parts[3])
    output = output.reshape(*output.shape[:2], -1)
    bias = bias_of(parts[0])
    if not all(np.isfinite(kernel).all() for kernel in (query, key, value, output)):
        return Step(constant=math.inf, reason=NOT_FINITE)
    centre = np.zeros(query.shape[1]) if domain.centre is None else domain.centre
    reduced = [_reduce(q, k, centre) for q, k in zip(query, key, strict=True)]
    per_head = [
        dot_product_constants(
            q,
            k,
            radius=domain.radius,
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
        axes=domain.axes(query.shape[1]),
        tokens=tokens,
        mask=mask,
        scale=layer._inverse_sqrt_key_dim,
        center=centre,
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
        published = _published(reduced, sizes, domain, tokens, layer)
    return Step(
        constant=constant,
        theorem=f"{theorem}, tokens in a ball of radius {domain.radius:.4g}",
        reason="its constants overflow" if math.isinf(constant) else "",
        published=published,
        domain=_values(value, output, parts, sizes, domain, zero_rows=empty_rows and not fused),
        # Query, value and key are one tensor.
        operands=(call.state,),
    )


def _reduce(query: np.ndarray, key: np.ndarray, centre: np.ndarray):
    """Kernels and centre in the span of the kernels' columns: products between them stay."""
    basis, joint = np.linalg.qr(np.concatenate([query, key], axis=1))
    return joint[:, : query.shape[1]], joint[:, query.shape[1] :], centre @ basis


def _has_empty_row(mask, window: int | None) -> bool:
    """Whether some query may see no key, for a class of masks or an array of visible pairs."""
    if isinstance(mask, str):
        return mask == "any"
    if window is not None:
        length = mask.shape[-1]
        lag = np.subtract.outer(np.arange(length), np.arange(length))
        mask = mask & (np.abs(lag) < window)
    return not mask.any(axis=-1).all()


def _values(value, output, parts, sizes, domain: Domain, *, zero_rows: bool) -> Domain:
    """Averages of tokens stay in the ball; each head maps them linearly.

    With `zero_rows` a head may give zero instead.
    """
    width = output.shape[-1]
    centre = np.zeros(value.shape[1]) if domain.centre is None else domain.centre
    inner, outer = bias_of(parts[2]), bias_of(parts[3])
    moved = Domain(0.0) if outer is None else Domain(0.0, outer.reshape(-1))
    for head, size in enumerate(sizes):
        image = centre @ value[head] + (0.0 if inner is None else inner[head])
        reached = Domain(SAFETY * float(size) * domain.radius, image @ output[head])
        moved = moved.plus(reached.including(np.zeros(width)) if zero_rows else reached)
    return moved


def _published(reduced, sizes, domain: Domain, tokens: int, layer) -> float:
    """Castin, Ablin and Peyre, "How smooth is attention?": a sum over heads without biases."""
    biases = [bias_of(layer._query_dense), bias_of(layer._key_dense)]
    if any(bias is not None and np.any(bias) for bias in biases):
        return math.inf
    square = domain.outer_radius**2
    total = 0.0
    for size, (query, key, _) in zip(sizes, reduced, strict=True):
        score = layer._inverse_sqrt_key_dim * operator_norm(key @ query.T) * square
        total += size * math.sqrt(3.0 * (score**2 * (4 * tokens + 1) + tokens))
    return SAFETY * total


@register_rule(
    keras.layers.AdditiveAttention, keras.layers.Attention, keras.layers.GroupQueryAttention
)
def other_attention(layer, call):
    return Step(
        constant=math.inf,
        reason="this kind of attention has no bound here; L2MultiHeadAttention has one, and "
        "MultiHeadAttention where its tokens are bounded",
    )


@register_operation("DotProductAttention")
def dot_product_attention(operation, call):
    return Step(constant=math.inf, reason="dot-product attention on free tensors is not Lipschitz")
