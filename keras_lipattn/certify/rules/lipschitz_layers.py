"""The layers of this package, which know their own constants."""

import dataclasses
import math

import keras
import numpy as np

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.linear_map import centred_diagonal_norm
from keras_lipattn.certify.registry import register_own_bound, register_rule
from keras_lipattn.certify.rules.activations import with_activation
from keras_lipattn.certify.rules.linear import NOT_FINITE, matrix_step
from keras_lipattn.certify.rules.local_attention import CAP_ROUNDING, UNSETTLED, near_input
from keras_lipattn.certify.rules.merging import operands_of, weighted_sum
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState, product
from keras_lipattn.certify.weights import as_run, bias_of
from keras_lipattn.layers import (
    CenterNormalization,
    L2MultiHeadAttention,
    MaxMin,
    PositionEmbedding,
    Residual,
    ScaledCosineAttention,
    SpectralDense,
)
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer


@register_own_bound
@register_rule(LipschitzLayer, subclasses=True)
def lipschitz_layer(layer, call):
    """A layer with a method `lipschitz` like that of the layers of this package."""
    bound = layer.lipschitz(
        sequence_length=call.state.tokens,
        norm=call.norm,
        mask="full" if call.mask is None else call.mask,
    )
    if not isinstance(bound, LipschitzBound) or bound.kind != "certified":
        return Step(
            constant=math.inf, reason="its method `lipschitz` returns no certified LipschitzBound"
        )
    return Step(
        constant=bound.value,
        published=bound.published if math.isfinite(bound.published) else math.nan,
        theorem=bound.theorem,
        reason=bound.reason,
        longest=call.state.tokens if any(call.state.dynamic) else None,
    )


@register_rule(L2MultiHeadAttention, ScaledCosineAttention)
def self_attention(layer, call):
    if call.kwargs.get("return_attention_scores"):
        return Step(
            constant=math.inf,
            reason="it also returns its attention scores, for which no bound is known",
        )
    if call.training and layer.dropout > 0.0:
        return Step(
            constant=math.inf,
            reason="the graph calls it with `training=True`: it draws random numbers at inference",
        )
    queries = [value for value in (*call.args, *map(call.kwargs.get, ("query", "value", "key")))]
    tensors = {id(state) for state in queries if isinstance(state, TensorState)}
    if len(tensors) != 1:
        return Step(constant=math.inf, reason="query, value and key are different tensors")
    mask, refusal = attention_mask_class(call)
    if refusal is not None:
        return refusal
    if call.kwargs.get("token_weights") is not None:
        return _weighted(layer, call, mask)
    tokens = attention_length(layer.attention_axes, call.state)
    visibility, most = layer._asked(tokens, call.norm, mask)
    # The cap that runs is that of the call, whatever masks the certificate is to cover.
    given = call.kwargs.get("attention_mask")
    causal = bool(call.kwargs.get("use_causal_mask"))
    capped_for = layer.capped_for(given, causal)
    if given is not None:
        visibility = visibility.within(capped_for)
    bound = layer.certified(call.norm, visibility, most, capped_for)
    reason = bound.reason
    if math.isinf(bound.value) and tokens is None:
        reason += "; `certify` takes a `sequence_length`"
    step = Step(
        constant=bound.value,
        # `inf` stands for "not evaluated" too.
        published=bound.published if isinstance(layer, L2MultiHeadAttention) else math.nan,
        theorem=bound.theorem,
        reason=reason,
        # Query, value and key are one tensor.
        operands=(call.state,),
        # Without a length in the graph the layer took its own.
        longest=_longest(layer, tokens, call.state),
    )
    # Theorem 6 is for attention by distance.
    return near_input(layer, call, step, mask) if isinstance(layer, L2MultiHeadAttention) else step


def _weighted(layer, call: Call, mask) -> Step:
    """Attention on tokens with weights, which have a constant where they are written down."""
    weights = call.kwargs["token_weights"]
    if isinstance(weights, TensorState) or len(call.state.shape) > 2:
        return Step(
            constant=math.inf,
            reason="the weights of its tokens are not written down where it is called; only for "
            "given weights, of one sequence an example, is there a constant",
        )
    bound = layer.lipschitz(norm=call.norm, mask=mask, token_weights=call.constant(weights))
    return Step(
        constant=bound.value, theorem=bound.theorem, reason=bound.reason, operands=(call.state,)
    )


def _longest(layer, tokens: int | None, state: TensorState) -> int | None:
    """The number of tokens up to which a constant holds, where the graph leaves it open."""
    if not any(state.dynamic):
        return None
    return layer.max_sequence_length if tokens is None else tokens


def attention_mask_class(call: Call):
    """The class of mask that an attention layer is called with, or why there is no bound.

    Args:
        call: the call.

    Returns:
        `(mask, None)` with `"full"` (none, or padding), `"causal"`, `"any"` or an array of visible
        pairs; or `(None, refusal)`.
    """
    causal = bool(call.kwargs.get("use_causal_mask"))
    given = call.kwargs.get("attention_mask")
    masks = [call.kwargs.get(name) for name in ("query_mask", "value_mask", "key_mask")]
    for value in (given, *masks):
        if isinstance(value, TensorState) and not value.held:
            return None, Step(
                constant=math.inf,
                reason="its mask is computed from a certified input, which jumps when the input "
                "moves; `assume_fixed_mask=True` certifies for a fixed mask",
            )
    if given is None:
        if causal:
            return "causal", None
        # What is claimed of masks does not make those smaller that the graph shows.
        return ("any" if isinstance(call.mask, str) and call.mask == "any" else "full"), None
    if isinstance(given, TensorState):
        return (call.mask if call.mask is not None else "any"), None
    pairs = np.asarray(given, bool)
    # With several axes in an example, only masks of rank 2 and 3 surely end in flattened tokens.
    flattened = len(call.state.shape) == 2 or pairs.ndim <= 3
    if flattened and pairs.ndim >= 2 and pairs.shape[-1] == pairs.shape[-2]:
        if causal:
            pairs = np.logical_and(pairs, np.tri(pairs.shape[-1], dtype=bool))
        return pairs, None
    return "any", None


def attention_length(attention_axes, state: TensorState) -> int | None:
    """Largest number of tokens that attend to each other."""
    if attention_axes is None:
        return product(state.shape[:-1])
    rank = len(state.shape) + 1
    axes = attention_axes if isinstance(attention_axes, tuple | list) else (attention_axes,)
    return product(tuple(state.shape[axis % rank - 1] for axis in axes))


@register_rule(SpectralDense)
def spectral_dense(layer, call):
    kernel = (layer._condensed or layer._condense()).kernel.astype(np.float64)
    step = matrix_step(kernel, bias_of(layer), call.norm)
    capped = layer.spectral_norm is not None and step.constant > 0.99 * layer.spectral_norm
    if capped and layer._condensed is None:
        # The cap may be at work, and then with an upper bound of the norm: the kernel that runs is
        # this one times an unknown number in (0, 1], which rules out adding it to others.
        step = Step(
            constant=step.constant,
            theorem=step.theorem,
            reason=step.reason,
            exact=step.exact,
            domain=_shrunk(step, call),
        )
    return _near_input(layer, call, kernel, with_activation(step, layer, call, layer.units))


def _near_input(layer: SpectralDense, call: Call, kernel: np.ndarray, step: Step) -> Step:
    """The step with the value at the centre of a local certificate."""
    near = call.state.near
    if near is None or math.isinf(step.constant):
        return step
    if not layer._is_settled():
        return dataclasses.replace(step, lost=UNSETTLED)
    if isinstance(layer.activation, keras.layers.Layer):
        return dataclasses.replace(step, lost="its activation is a layer with a dtype of its own")
    bias = bias_of(layer)
    value = near.value @ kernel + (0.0 if bias is None else bias)
    if not call.drop_activation:
        value = keras.ops.convert_to_numpy(layer.activation(keras.ops.convert_to_tensor(value)))
    drift = CAP_ROUNDING * step.constant * near.size if layer._cache is not None else 0.0
    return dataclasses.replace(step, value=value, drift=drift)


def _shrunk(step: Step, call: Call) -> Domain | None:
    """Where `x @ (t kernel) + bias` can be for any `t` in `[0, 1]`."""
    domain = call.state.domain
    if not domain.bounded or call.norm == "linf" or math.isinf(step.constant):
        return None
    moved = Domain(step.constant * domain.outer_radius)
    return moved if step.bias is None else moved.plus(Domain.of_values(step.bias))


@register_rule(CenterNormalization)
def center_normalization(layer, call):
    width = call.state.shape[-1]
    gamma = np.ones(width) if layer.gamma is None else as_run(layer.gamma, layer.compute_dtype)
    beta = None if layer.beta is None else as_run(layer.beta, layer.compute_dtype)
    if not np.isfinite(gamma).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    stretch = width / (width - 1.0)
    matrix = stretch * (np.diag(gamma) - gamma[None, :] / width)
    spectral = stretch * centred_diagonal_norm(gamma)
    return matrix_step(matrix, beta, call.norm, spectral=spectral)


@register_rule(MaxMin)
def max_min(layer, call):
    # Entries are sorted in pairs: wherever it has a Jacobian, that is a permutation.
    return Step(
        constant=1.0,
        theorem="sorts entries in pairs",
        exact=True,
        domain=call.state.domain.around_origin(),
    )


@register_rule(PositionEmbedding)
def position_embedding(layer, call):
    table = as_run(layer.embedding, call.output_dtype)
    if not np.isfinite(table).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    return Step(
        constant=1.0, theorem="a shift of each token", exact=True, is_linear_map=True, bias=table
    )


@register_rule(Residual)
def residual(layer, call):
    operands = operands_of(call.args[0], call)
    alpha = layer.alpha_value()
    if alpha is None:
        return weighted_sum(operands, [1.0, 1.0], call, "x + f(x)")
    alpha = float(as_run(np.float64(alpha), layer.compute_dtype))
    if not 0.0 <= alpha <= 1.0:
        return Step(constant=math.inf, reason=f"its weight alpha={alpha} is not in [0, 1]")
    return weighted_sum(operands, [1.0 - alpha, alpha], call, "(1 - a) x + a f(x)")
