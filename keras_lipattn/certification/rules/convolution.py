"""Convolutions (docs/theory.md, section 8)."""

import dataclasses
import itertools
import math
import types

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, TokenMixing, chain, unbounded
from keras_lipattn.certification.reasons import (
    FIXED_SIZES,
    NOT_FINITE,
    UNKNOWN_TOKENS,
    in_training,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.activations import convert, with_activation
from keras_lipattn.certification.rules.linear import matrix_map, quantized
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import bias_of, kernel_of
from keras_lipattn.layers import SpectralConv2D
from keras_lipattn.linalg import SAFETY, operator_norm

_THEOREM = {
    "l2": "overlap of patches and frequencies of the kernel",
    "token": "sum over the offsets of the kernel",
    "linf": "largest sum over an output",
}


@register_rule(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
def convolution_layer(layer, call):
    refusal = quantized(layer)
    if refusal is not None:
        return refusal
    layer_map = _convolution(layer, kernel_of(layer), bias_of(layer), layer.groups, call)
    return with_activation(layer_map, layer, call, call.shape[-1])


@register_rule(SpectralConv2D)
def spectral_convolution(layer, call):
    if call.training and layer.has_caps:
        return unbounded(in_training("its cap uses running norms"))
    kernel = layer.host_weights().weights().output.reshape(layer.kernel.shape).astype(np.float64)
    layer_map = _convolution(layer, kernel, bias_of(layer), 1, call)
    if layer.has_caps and not layer.is_condensed and math.isfinite(layer_map.constant):
        # The kernel at inference is this one times a number in (0, 1], so it cannot merge.
        layer_map = LipschitzMap(
            constant=layer_map.constant,
            theorem=layer_map.theorem,
            exact=layer_map.exact,
            range=_grouped_range(kernel, bias_of(layer), 1, call),
        )
    return with_activation(layer_map, layer, call, layer.units)


@register_rule(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
def depthwise(layer, call):
    kernel, groups = _depthwise(kernel_of(layer))
    layer_map = _convolution(layer, kernel, bias_of(layer), groups, call)
    return with_activation(layer_map, layer, call, call.shape[-1])


@register_rule(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
def separable(layer, call):
    first = kernel_of(layer, "depthwise_kernel")
    second = kernel_of(layer, "pointwise_kernel")
    layer_map = _separable(layer, first, second, bias_of(layer), call)
    return with_activation(layer_map, layer, call, call.shape[-1])


def _separable(layer, first, second, bias, call: LayerCall) -> LipschitzMap:
    wide, groups = _depthwise(first)
    apart = chain(
        _convolution(layer, wide, None, groups, call),
        _by_norm(matrix_map(second.reshape(second.shape[-2:]), bias, call.norm), layer, call),
    )
    # The same map as one convolution: offsets times channels to filters.
    channels, multiplier = first.shape[-2:]
    mixing = second.reshape(channels, multiplier, -1)
    together = _convolution(layer, np.einsum("...cm,cmf->...cf", first, mixing), bias, 1, call)
    return together if together.constant < apart.constant else apart


@register_operation("Conv", "DepthwiseConv", "SeparableConv", "ConvTranspose")
def convolution_operation(operation, call):
    image = call.argument("inputs")
    kernels = [value for name, value in call.arguments.items() if name.endswith("kernel")]
    if not isinstance(image, TensorState) or image.is_fixed or len(call.perturbed) > 1:
        return unbounded("its kernel changes with the input")
    known = [call.operand(kernel).values for kernel in kernels]
    if any(values is None for values in known):
        return unbounded("its kernel is not a constant of the model")
    first = known[0]
    like = types.SimpleNamespace(
        strides=operation.strides,
        dilation_rate=operation.dilation_rate,
        data_format=operation.data_format or keras.config.image_data_format(),
    )
    name = type(operation).__name__
    if name == "SeparableConv":
        return _separable(like, first, known[1], None, call)
    if name == "ConvTranspose":
        return _transposed(like, first, None, call)
    if name == "DepthwiseConv":
        kernel, groups = _depthwise(first)
        return _convolution(like, kernel, None, groups, call)
    channels = image.shape[0 if _channels_first(like) else -1]
    if channels is None:
        return unbounded("its number of channels is not known", remedy=FIXED_SIZES)
    return _convolution(like, first, None, channels // first.shape[-2], call)


@register_rule(
    keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose
)
def transposed(layer, call):
    kernel, bias = kernel_of(layer), bias_of(layer)
    return with_activation(_transposed(layer, kernel, bias, call), layer, call, call.shape[-1])


def _transposed(layer, kernel, bias, call: LayerCall) -> LipschitzMap:
    if not np.isfinite(kernel).all() or (bias is not None and not np.isfinite(bias).all()):
        return unbounded(NOT_FINITE)
    rank = kernel.ndim - 2
    strides, dilation = _each(layer.strides, rank), _each(layer.dilation_rate, rank)
    first = _channels_first(layer)
    if call.norm == "l2" or first:
        # The adjoint is a convolution with the same kernel, on an image of the full size.
        spans = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:rank], dilation, strict=True)]
        sizes = _spatial(call.state.shape, first)
        image = None
        if None not in sizes:
            image = [((n or 1) - 1) * s + k for n, s, k in zip(sizes, strides, spans, strict=True)]
        constant = layer_constants.convolution_constant(
            kernel, "l2", strides=strides, dilation=dilation, input_shape=image
        )
        layer_map = LipschitzMap(constant=constant, theorem="norm of the adjoint convolution")
        if call.norm != "l2":
            layer_map = _converted(constant, call, exact=False)
    else:
        layer_map = LipschitzMap(
            constant=_meeting_offsets(kernel, strides, dilation, call.norm),
            theorem="sum over the offsets that meet in an output",
            exact=call.norm == "linf",
        )
    before = call.state.range
    if before.bounded and not first and math.isfinite(layer_map.constant):
        moved = TokenRange(
            _meeting_offsets(kernel, strides, dilation, "token") * before.outer_radius
        )
        moved = moved if bias is None else moved.plus(TokenRange.of_values(bias))
        layer_map = dataclasses.replace(layer_map, range=moved)
    return layer_map


def _meeting_offsets(kernel: np.ndarray, strides, dilation, norm: str) -> float:
    """Largest sum over the offsets that contribute to one output of a transposed convolution."""
    rank = kernel.ndim - 2
    # In one axis the output p = s o + d t comes from offsets t in one class modulo s / gcd(s, d).
    classes = [
        [range(start, size, step) for start in range(min(step, size))]
        for size, step in zip(
            kernel.shape[:rank],
            [s // math.gcd(s, d) for s, d in zip(strides, dilation, strict=True)],
            strict=True,
        )
    ]
    largest = 0.0
    for chosen in itertools.product(*classes):
        part = kernel[np.ix_(*chosen)].reshape(-1, *kernel.shape[rank:])
        if norm == "linf":
            value = float(np.abs(part).sum(axis=(0, 2)).max())
        else:
            value = float(np.sum(operator_norm(part)))
        largest = max(largest, value)
    return SAFETY * largest


def _convolution(layer, kernel, bias, groups: int, call: LayerCall) -> LipschitzMap:
    if not np.isfinite(kernel).all() or (bias is not None and not np.isfinite(bias).all()):
        return unbounded(NOT_FINITE)
    rank = kernel.ndim - 2
    strides, dilation = _each(layer.strides, rank), _each(layer.dilation_rate, rank)
    first = _channels_first(layer)
    sizes = _spatial(call.state.shape, first)
    image = None if None in sizes else tuple(size or 0 for size in sizes)
    norm = "l2" if first and call.norm == "token" else call.norm
    constant = layer_constants.convolution_constant(
        kernel,
        norm,
        strides=strides,
        dilation=dilation,
        groups=groups,
        input_shape=image,
    )
    patches = tuple(strides) == kernel.shape[:rank] and set(dilation) == {1}
    exact = norm == "linf" or (norm == "l2" and patches)
    if norm != call.norm:
        return _converted(constant, call, exact=False)
    if groups > 1 or first:
        return LipschitzMap(
            constant=constant,
            theorem=_THEOREM[norm],
            exact=exact,
            range=None if first else _grouped_range(kernel, bias, groups, call),
        )
    # Patches followed by a matrix, which may merge with later linear maps.
    offsets = math.prod(kernel.shape[:rank])
    overlap = math.prod(
        -(-k * math.gcd(s, d) // s)
        for k, s, d in zip(kernel.shape[:rank], strides, dilation, strict=True)
    )
    cut = {"l2": overlap, "token": offsets, "linf": 1}[norm]
    before = call.state.range
    cutting = (TokenMixing if offsets == 1 else LipschitzMap)(
        constant=SAFETY * math.sqrt(cut) if cut > 1 else 1.0,
        theorem="patches",
        exact=patches,
        range=TokenRange(SAFETY * math.sqrt(offsets) * before.outer_radius, None, before.largest),
    )
    matrix = matrix_map(kernel.reshape(-1, kernel.shape[-1]), bias, call.norm)
    return chain(cutting, matrix, constant=constant, theorem=_THEOREM[norm], exact=exact)


def _grouped_range(kernel, bias, groups: int, call: LayerCall) -> TokenRange | None:
    """The range of the output: patches of bounded tokens, times the kernels of the groups."""
    before = call.state.range
    if not before.bounded:
        return None
    offsets = math.prod(kernel.shape[:-2])
    blocks = kernel.reshape(offsets * kernel.shape[-2], groups, -1)
    norms = operator_norm(np.moveaxis(blocks, 1, 0))
    # Groups have separate channels, so the squared norms of their inputs add up to that of a patch.
    moved = TokenRange(
        SAFETY * float(np.max(norms)) * SAFETY * math.sqrt(offsets) * before.outer_radius
    )
    return moved if bias is None else moved.plus(TokenRange.of_values(bias))


def _depthwise(kernel: np.ndarray) -> tuple[np.ndarray, int]:
    """The kernel of a depthwise convolution as one of a grouped convolution, and the groups."""
    channels, multiplier = kernel.shape[-2:]
    return kernel.reshape(*kernel.shape[:-2], 1, channels * multiplier), channels


def _by_norm(layer_map: LipschitzMap, layer, call: LayerCall) -> LipschitzMap:
    """The map of a matrix on the channels, also if these are not the last axis."""
    if not _channels_first(layer) or math.isinf(layer_map.constant):
        return layer_map
    if call.norm == "token":
        return _converted(layer_map.constant, call, exact=False)
    return LipschitzMap(
        constant=layer_map.constant, theorem=layer_map.theorem, exact=layer_map.exact
    )


def _converted(constant: float, call: LayerCall, *, exact: bool) -> LipschitzMap:
    price = convert("l2", call.norm, call.state)
    if math.isinf(price):
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(constant=constant * price, theorem="2-norm, converted", exact=exact)


def _channels_first(layer) -> bool:
    return layer.data_format == "channels_first"


def _spatial(shape, first: bool):
    return list(shape[1:] if first else shape[:-1])


def _each(value, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if np.ndim(value) == 0 else tuple(int(v) for v in value)
