"""Local bounds of L2 attention: Theorem 6 of docs/theory.md, with masks and weights."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds.key_weights import (
    biases_by_lag,
    weighted_constants,
    weights_of_pairs,
)
from keras_lipattn.bounds.local import local_layer_bound
from keras_lipattn.bounds.unit_head import unit_head_bound
from keras_lipattn.certification.evaluation import in_float64
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import CenterValue, LipschitzMap
from keras_lipattn.certification.tensor_state import Enclosure, TensorState
from keras_lipattn.certification.weights import cast_to_compute_dtype
from keras_lipattn.layers import BoundedMultiHeadAttention, L2MultiHeadAttention, SelfAttention
from keras_lipattn.layers._masks import mask_class
from keras_lipattn.layers._weights import EffectiveWeights, matrix_shape
from keras_lipattn.layers.token_projection import inner_radius
from keras_lipattn.linalg import SAFETY, operator_norm

# Relative difference of capped weights with cached norms from those with exact norms.
CAP_ROUNDING = 2e-5
UNSETTLED = (
    "its caps use norms that are computed only in its graph; call `condense()` on the layer, or "
    "certify inside `condensed(model)`"
)

# The weights of keys are the exponentials of biases.
_MOST_BIAS = 100.0
_TOKEN_MASKS = ("query_mask", "value_mask", "key_mask")


def near_input(
    layer: L2MultiHeadAttention, call: LayerCall, layer_map: LipschitzMap, mask: Any
) -> LipschitzMap:
    """The map of the layer in a local certificate whose enclosure of the input is known.

    Args:
        layer: the layer.
        call: the call.
        layer_map: the global map of the layer.
        mask: class of the mask, see `attention_mask_class`.

    Returns:
        A `LipschitzMap` whose constant is not larger, with the value at the center.
    """
    near = call.state.enclosure
    if near is None or call.norm == "linf" or math.isinf(layer_map.constant):
        # Theorem 6 does not cover the max norm.
        return layer_map
    reason = _unknown(layer, call)
    if reason:
        return dataclasses.replace(layer_map, center=CenterValue(reason=reason))
    cap_mask = mask_class(mask, sliding_window=layer.sliding_window)
    state = layer.host_weights()
    weights = state.weights(cap_mask)
    b, c = (np.asarray(matrix, np.float64) for matrix in (weights.b, weights.output))
    allowances = layer.rounding_allowances(state, cap_mask)
    if layer.token_radius is not None:
        # The projection does not enlarge distances.
        moved = projected(near.value, layer.token_radius, layer.compute_dtype)
        near = dataclasses.replace(near, value=moved)
    errors = [allowances["query_error"], allowances["product_error"]]
    if layer.has_caps and not layer.is_condensed:
        sizes = (np.linalg.norm(matrix, axis=(1, 2)) for matrix in (b, c))
        errors = [e + CAP_ROUNDING * size for e, size in zip(errors, sizes, strict=True)]
    valid, pairs = _visible(layer, call, near)
    tokens = _array(layer.axes.flatten(keras.ops.convert_to_tensor(near.value)))
    outputs = np.zeros((*tokens.shape[:2], c.shape[-1]))
    constants, errors_made, theorem = [], [], ""
    for index, kept in enumerate(valid):
        if not kept.any():
            # Padded tokens give zero rows.
            continue
        x = tokens[index, kept]
        seen = pairs[index if len(pairs) > 1 else 0][:, kept][:, :, kept]
        bound = local_layer_bound(
            x,
            near.radius,
            b,
            c,
            mask=seen,
            norm=call.norm,
            product_scale=allowances["product_scale"],
            query_error=errors[0],
            product_error=errors[1],
        )
        constants.append(bound.value)
        theorem = bound.theorem
        mixed = _mixed(x, b, seen)
        outputs[index, kept] = np.einsum("hnk,hko->no", mixed, c)
        if layer.relative_bias is None:
            unit: Any = unit_head_bound(len(x), "any").value
        else:
            unit = [float(weighted_constants(weights_of_pairs(head), "l2").max()) for head in seen]
        errors_made.append(_rounding_error(x, mixed, c, np.asarray(unit), *errors))
        if layer.output_bias is not None:
            outputs[index, kept] += np.ravel(
                cast_to_compute_dtype(layer.output_bias, layer.compute_dtype)
            )
    value = layer.axes.restore(
        keras.ops.convert_to_tensor(outputs), keras.ops.convert_to_tensor(near.value)
    )
    value = _array(layer.shape_outputs(value, value))
    center = CenterValue(value=value, rounding_error=math.hypot(*errors_made))
    layer_map = dataclasses.replace(layer_map, center=center)
    local = max(constants, default=math.inf)
    if not local < layer_map.constant:
        return layer_map
    return dataclasses.replace(layer_map, constant=local, theorem=theorem)


def projected(tokens: Any, radius: float, dtype: str) -> np.ndarray:
    """What `project_tokens` returns in this dtype, before it is rounded."""
    tokens = np.asarray(tokens, np.float64)
    inner = inner_radius(radius, tokens.shape[-1], dtype)
    sizes = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens * (inner / np.maximum(sizes, inner))


def product_near_input(
    layer: BoundedMultiHeadAttention, call: LayerCall, layer_map: LipschitzMap, cap_mask: Any
) -> LipschitzMap:
    """The map with the value at the center of a local certificate.

    Its constant is already that of the ball around the center.
    """
    near = call.state.enclosure
    if near is None or math.isinf(layer_map.constant):
        return layer_map
    reason = _unknown(layer, call)
    if layer.spectral_norm is not None and not layer.is_condensed:
        reason = reason or UNSETTLED
    if layer.compute_dtype not in ("float32", "float64"):
        reason = reason or f"it computes in {layer.compute_dtype}"
    if reason:
        return dataclasses.replace(layer_map, center=CenterValue(reason=reason))
    weights = layer.host_weights().weights(cap_mask)
    output = weights.output.reshape(matrix_shape(weights.output))
    projection, output = (
        keras.ops.convert_to_tensor(np.asarray(part, np.float64))
        for part in (weights.projection, output)
    )
    effective = EffectiveWeights(projection, output, layer.score_biases(np))
    # Inside the ball, the projection in float64 changes nothing.
    tokens = projected(near.value, layer.token_radius, layer.compute_dtype)
    x = keras.ops.convert_to_tensor(tokens)
    masks = {name: _values(call.argument(name)) for name in _TOKEN_MASKS}
    masks |= {f"mask {i}": _values(mask) for i, mask in enumerate(call.keras_masks)}
    pairs = _values(call.argument("attention_mask"))
    with keras.StatelessScope(), in_float64(layer):
        mask = layer.mask_of_call(
            x,
            {n: None if m is None else keras.ops.convert_to_tensor(m) for n, m in masks.items()},
            None if pairs is None else keras.ops.convert_to_tensor(pairs),
            bool(call.argument("use_causal_mask")),
        )
        value = _array(layer.call_with_weights(effective, x, mask))
        error = 0.0
        if layer.has_caps and not layer.is_condensed:
            # Its output before the bias is scaled.
            bias = 0.0 if layer.output_bias is None else _array(layer.output_bias.value)
            error = CAP_ROUNDING * float(np.linalg.norm(value) + np.linalg.norm(bias + 0.0 * value))
    return dataclasses.replace(layer_map, center=CenterValue(value=value, rounding_error=error))


def _unknown(layer: SelfAttention, call: LayerCall) -> str:
    """The reason why the weights or masks of this call are not known, empty if they are."""
    if not layer.caps_are_exact():
        return UNSETTLED
    if layer.relative_bias is not None and not np.abs(layer.score_biases(np)).max() < _MOST_BIAS:
        return f"a bias by relative position is larger than {_MOST_BIAS:g}"
    if call.mask is not None:
        return "the values of its masks are not known, only their class `mask`"
    given = call.argument("attention_mask")
    if given is not None and layer.lipschitz_bound is not None:
        return "its cap depends on the class of its attention mask in the graph"
    for value in (given, *map(call.argument, _TOKEN_MASKS), *call.keras_masks):
        if isinstance(value, TensorState):
            if value.enclosure is None:
                return "its mask is not known"
        elif value is not None and np.ndim(value) > 2 and np.shape(value)[0] != 1:
            return "its mask differs from example to example"
    return ""


def _visible(
    layer: SelfAttention, call: LayerCall, near: Enclosure
) -> tuple[np.ndarray, np.ndarray]:
    """Valid tokens `(S, T)`, and visible pairs or weights `(S or 1, H, T, T)`, of all sequences."""
    axes = layer.axes
    shape = near.value.shape
    masks = [_values(call.argument(name)) for name in _TOKEN_MASKS] + [
        _values(mask) for mask in call.keras_masks
    ]
    valid = np.ones(shape[:-1], bool)
    for mask in masks:
        if mask is not None:
            valid = valid & np.asarray(mask, bool)
    valid = _array(axes.flatten_mask(keras.ops.convert_to_tensor(valid)))
    length = valid.shape[1]
    pairs = np.ones((1, layer.num_heads, length, length), bool)
    given = _values(call.argument("attention_mask"))
    if given is not None:
        given = keras.ops.convert_to_tensor(np.asarray(given, bool))
        pairs = pairs & _array(axes.flatten_pairs(given, near.value))
    lag = np.subtract.outer(np.arange(length), np.arange(length))
    if call.argument("use_causal_mask"):
        pairs = pairs & (lag >= 0)
    if layer.sliding_window is not None:
        pairs = pairs & (np.abs(lag) < layer.sliding_window)
    pairs = pairs | (lag == 0)
    if layer.relative_bias is None:
        return valid, pairs
    return valid, pairs * np.exp(biases_by_lag(layer.score_biases(np), lag))


def _values(mask: Any) -> Any:
    return (
        mask.enclosure.value
        if isinstance(mask, TensorState) and mask.enclosure is not None
        else mask
    )


def _mixed(x: np.ndarray, b: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The outputs of the heads, `(H, N, k)`; `seen` holds visible pairs or weights."""
    mean = x.mean(axis=0)
    # Differences of centered tokens lose no digits.
    y = (x - mean) @ b
    distances = np.stack([np.square(head[:, None] - head[None]).sum(axis=-1) for head in y])
    kernel = seen * np.exp(-distances)
    weights = kernel / kernel.sum(axis=-1, keepdims=True)
    return weights @ y + (mean @ b)[:, None]


def _rounding_error(x, mixed, c, unit, query_error, product_error) -> float:
    """Bound of the change of the output when the kernels change by the errors.

    `unit` is a constant of the unit head, for all heads or `(H,)`.
    """
    moved = math.sqrt(2.0) * unit * float(np.linalg.norm(x)) * query_error
    heads = np.linalg.norm(mixed, axis=(1, 2))
    sizes = SAFETY * np.asarray(operator_norm(c))
    return float(np.sum(product_error * (heads + moved) + moved * sizes))


def _array(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor)
