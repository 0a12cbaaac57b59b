"""The other layers of this package: dense layers, activations, pooling, residuals."""

import dataclasses
import math

import keras
import numpy as np

from keras_lipattn.bounds.layer_constants import center_normalization_constant
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.linear_map import matrix_norm
from keras_lipattn.certification.maps import Affine, CenterValue, LipschitzMap, unbounded
from keras_lipattn.certification.reasons import NOT_FINITE, UNKNOWN_TOKENS, in_training
from keras_lipattn.certification.registry import register_rule
from keras_lipattn.certification.rules.activations import with_activation
from keras_lipattn.certification.rules.linear import matrix_map
from keras_lipattn.certification.rules.local_attention import CAP_ROUNDING, UNSETTLED
from keras_lipattn.certification.rules.merging import operands_of, weighted_sum
from keras_lipattn.certification.rules.reshaping import regroup, tokens_move
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import bias_of, cast_to_compute_dtype
from keras_lipattn.layers import (
    CenterNormalization,
    HalfAbs,
    MaxMin,
    NormalizedDense,
    NormPooling,
    OrthogonalDense,
    PositionEmbedding,
    Residual,
    SpaceToDepth,
    SpectralDense,
)
from keras_lipattn.layers._dense import DenseLayer
from keras_lipattn.layers.norm_pooling import FLOOR
from keras_lipattn.linalg import SAFETY


@register_rule(OrthogonalDense)
def orthogonal_dense(layer, call):
    if call.training:
        return unbounded(in_training("its kernel is only orthonormal up to roundings"))
    kernel = layer.host_weights().weights().output.astype(np.float64)
    layer_map = matrix_map(kernel, bias_of(layer), call.norm)
    if math.isfinite(layer_map.constant) and not layer.caps_are_exact():
        # The kernel at inference is not known, so that it cannot merge with other maps.
        layer_map = LipschitzMap(
            constant=layer.largest_constant(call.norm),
            theorem=layer_map.theorem,
            range=_of_norm(layer.largest_constant("l2"), bias_of(layer), call),
        )
    return _near_input(layer, call, kernel, with_activation(layer_map, layer, call, layer.units))


@register_rule(NormalizedDense)
def normalized_dense(layer, call):
    kernel = layer.host_weights().weights().output.astype(np.float64)
    layer_map = matrix_map(kernel, bias_of(layer), call.norm)
    return _near_input(layer, call, kernel, with_activation(layer_map, layer, call, layer.units))


@register_rule(SpectralDense)
def spectral_dense(layer, call):
    if call.training and layer.has_caps:
        return unbounded(in_training("its cap uses running norms"))
    kernel = layer.host_weights().weights().output.astype(np.float64)
    layer_map = matrix_map(kernel, bias_of(layer), call.norm)
    capped = layer.spectral_norm is not None and layer_map.constant > 0.99 * layer.spectral_norm
    if capped and not layer.is_condensed:
        # If the cap is active, it divides by an upper bound of the norm: the kernel at inference is
        # this one times an unknown number in (0, 1], so that it cannot merge with other maps.
        layer_map = LipschitzMap(
            constant=layer_map.constant,
            theorem=layer_map.theorem,
            reason=layer_map.reason,
            exact=layer_map.exact,
            # For any factor of the cap in `[0, 1]`. The radius is Euclidean in every norm.
            range=_of_norm(matrix_norm(kernel, "l2"), bias_of(layer), call),
        )
    return _near_input(layer, call, kernel, with_activation(layer_map, layer, call, layer.units))


def _near_input(
    layer: DenseLayer,
    call: LayerCall,
    kernel: np.ndarray,
    layer_map: LipschitzMap,
) -> LipschitzMap:
    """The map with the value at the center of a local certificate."""
    near = call.state.enclosure
    if near is None or math.isinf(layer_map.constant):
        return layer_map
    if not layer.caps_are_exact():
        return dataclasses.replace(layer_map, center=CenterValue(reason=UNSETTLED))
    if isinstance(layer.activation, keras.layers.Layer):
        reason = "its activation is a layer with its own dtype"
        return dataclasses.replace(layer_map, center=CenterValue(reason=reason))
    bias = bias_of(layer)
    value = near.value @ kernel + (0.0 if bias is None else bias)
    if not call.drop_activation:
        value = keras.ops.convert_to_numpy(layer.activation(keras.ops.convert_to_tensor(value)))
    rounded = layer.has_caps or not isinstance(layer, SpectralDense)
    error = CAP_ROUNDING * layer_map.constant * near.size if rounded else 0.0
    return dataclasses.replace(layer_map, center=CenterValue(value=value, rounding_error=error))


def _of_norm(size: float, bias: np.ndarray | None, call: LayerCall) -> TokenRange | None:
    """The range of `x @ kernel + bias` for any kernel of a 2-norm of at most `size`."""
    before = call.state.range
    if not before.bounded or math.isinf(size):
        return None
    moved = TokenRange(size * before.outer_radius)
    return moved if bias is None else moved.plus(TokenRange.of_values(bias))


@register_rule(CenterNormalization)
def center_normalization(layer, call):
    width = call.state.shape[-1]
    gamma = (
        np.ones(width)
        if layer.gamma is None
        else cast_to_compute_dtype(layer.gamma, layer.compute_dtype)
    )
    beta = None if layer.beta is None else cast_to_compute_dtype(layer.beta, layer.compute_dtype)
    if not np.isfinite(gamma).all():
        return unbounded(NOT_FINITE)
    stretch = width / (width - 1.0)
    matrix = stretch * (np.diag(gamma) - gamma[None, :] / width)
    return matrix_map(matrix, beta, call.norm, spectral=center_normalization_constant(gamma))


@register_rule(MaxMin)
def max_min(layer, call):
    # Its Jacobian is a permutation.
    return _keeps_sizes("sorts pairs of entries", call)


@register_rule(HalfAbs)
def half_abs(layer, call):
    return _keeps_sizes("absolute values of entries", call)


def _keeps_sizes(theorem: str, call: LayerCall) -> LipschitzMap:
    """A map of constant 1 in every norm that does not change the norm of a token."""
    return LipschitzMap(
        constant=1.0, theorem=theorem, exact=True, range=call.state.range.about_origin()
    )


@register_rule(SpaceToDepth)
def space_to_depth(layer, call):
    if layer.block_size == 1:
        return tokens_move(call, "nothing moves")
    return regroup(
        call, layer.block_size ** (len(call.state.shape) - 1), "tokens of a block in one"
    )


@register_rule(NormPooling)
def norm_pooling(layer, call):
    positions = layer.positions((None, *call.state.shape))
    theorem, range_ = "norms of disjoint parts", None
    before = call.state.range
    if positions is not None and before.bounded:
        floor = FLOOR * math.sqrt(call.state.shape[-1])
        range_ = TokenRange(SAFETY * math.sqrt(positions) * before.outer_radius + floor)
    if call.norm == "l2":
        return LipschitzMap(constant=1.0, theorem=theorem, exact=True, range=range_)
    if positions is None:
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(
        constant=SAFETY * math.sqrt(positions), theorem=theorem, exact=True, range=range_
    )


@register_rule(PositionEmbedding)
def position_embedding(layer, call):
    table = cast_to_compute_dtype(layer.embedding, call.output_dtype)
    if not np.isfinite(table).all():
        return unbounded(NOT_FINITE)
    return Affine(constant=1.0, theorem="a shift of each token", exact=True, bias=table)


@register_rule(Residual)
def residual(layer, call):
    operands = operands_of(call, "inputs")
    alpha = layer.alpha_value()
    if alpha is None:
        return weighted_sum(operands, [1.0, 1.0], call, "x + f(x)")
    alpha = float(cast_to_compute_dtype(np.float64(alpha), layer.compute_dtype))
    if not 0.0 <= alpha <= 1.0:
        return unbounded(f"its weight alpha={alpha} is not in [0, 1]")
    return weighted_sum(operands, [1.0 - alpha, alpha], call, "(1 - a) x + a f(x)")
