"""Convolutions: overlap of patches, frequencies, sums over offsets (docs/theory.md, section 8)."""

import itertools
import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.rules.activations import convert, with_activation
from keras_lipattn.certify.rules.linear import NOT_FINITE, matrix_step, quantized
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.weights import bias_of, kernel_of
from keras_lipattn.linalg import SAFETY, operator_norm

_THEOREM = {
    "l2": "overlap of patches and frequencies of the kernel",
    "token": "sum over the offsets of the kernel",
    "linf": "largest sum over an output",
}


@register_rule(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
def convolution(layer, call):
    refusal = quantized(layer)
    if refusal is not None:
        return refusal
    step = _convolution(layer, kernel_of(layer), bias_of(layer), layer.groups, call)
    return with_activation(step, layer, call, call.shape[-1])


@register_rule(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
def depthwise(layer, call):
    kernel, groups = _depthwise(kernel_of(layer))
    step = _convolution(layer, kernel, bias_of(layer), groups, call)
    return with_activation(step, layer, call, call.shape[-1])


@register_rule(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
def separable(layer, call):
    first = kernel_of(layer, "depthwise_kernel")
    second = kernel_of(layer, "pointwise_kernel")
    bias = bias_of(layer)
    wide, groups = _depthwise(first)
    apart = Step.chain(
        _convolution(layer, wide, None, groups, call),
        _by_norm(matrix_step(second.reshape(second.shape[-2:]), bias, call.norm), layer, call),
    )
    # The same map as one convolution: offsets times channels to filters.
    channels, multiplier = first.shape[-2:]
    mixing = second.reshape(channels, multiplier, -1)
    together = _convolution(layer, np.einsum("...cm,cmf->...cf", first, mixing), bias, 1, call)
    step = together if together.constant < apart.constant else apart
    return with_activation(step, layer, call, call.shape[-1])


@register_rule(
    keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose
)
def transposed(layer, call):
    kernel, bias = kernel_of(layer), bias_of(layer)
    if not np.isfinite(kernel).all() or (bias is not None and not np.isfinite(bias).all()):
        return Step(constant=math.inf, reason=NOT_FINITE)
    rank = layer.rank
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
        step = Step(constant=constant, theorem="norm of the adjoint convolution")
        if call.norm != "l2":
            step = _converted(constant, call, exact=False)
    else:
        step = Step(
            constant=_meeting_offsets(kernel, strides, dilation, call.norm),
            theorem="sum over the offsets that meet in an output",
            exact=call.norm == "linf",
        )
    return with_activation(step, layer, call, call.shape[-1])


def _meeting_offsets(kernel: np.ndarray, strides, dilation, norm: str) -> float:
    """Largest sum over the offsets that reach one output of a transposed convolution."""
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


def _convolution(layer, kernel, bias, groups: int, call: Call) -> Step:
    if not np.isfinite(kernel).all() or (bias is not None and not np.isfinite(bias).all()):
        return Step(constant=math.inf, reason=NOT_FINITE)
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
    domain = call.state.domain
    if first:
        return Step(constant=constant, theorem=_THEOREM[norm], exact=exact)
    if groups > 1:
        outputs = None
        if domain.bounded:
            # Padding has tokens of zeros: those of the input lie in a ball around the origin.
            size = layer_constants.convolution_constant(
                kernel, "token", strides=strides, dilation=dilation, groups=groups
            )
            shift = Domain(0.0) if bias is None else Domain.of_values(bias)
            outputs = Domain(size * domain.outer_radius).plus(shift)
        return Step(constant=constant, theorem=_THEOREM[norm], exact=exact, domain=outputs)
    # Cutting patches, then one matrix: the matrix may merge with what follows.
    offsets = math.prod(kernel.shape[:rank])
    overlap = math.prod(
        -(-k * math.gcd(s, d) // s)
        for k, s, d in zip(kernel.shape[:rank], strides, dilation, strict=True)
    )
    cut = {"l2": overlap, "token": offsets, "linf": 1}[norm]
    cutting = Step(
        constant=SAFETY * math.sqrt(cut) if cut > 1 else 1.0,
        theorem="patches",
        exact=patches,
        mixes_tokens=offsets == 1,
        domain=Domain(SAFETY * math.sqrt(offsets) * domain.outer_radius, None, domain.largest),
    )
    matrix = matrix_step(kernel.reshape(-1, kernel.shape[-1]), bias, call.norm)
    return Step.chain(cutting, matrix, constant=constant, theorem=_THEOREM[norm], exact=exact)


def _depthwise(kernel: np.ndarray) -> tuple[np.ndarray, int]:
    """The kernel of a depthwise convolution as that of a grouped one, and the groups."""
    channels, multiplier = kernel.shape[-2:]
    return kernel.reshape(*kernel.shape[:-2], 1, channels * multiplier), channels


def _by_norm(step: Step, layer, call: Call) -> Step:
    """A matrix on the channels when these are not the last axis."""
    if not _channels_first(layer) or math.isinf(step.constant):
        return step
    if call.norm == "token":
        return _converted(step.constant, call, exact=False)
    return Step(constant=step.constant, theorem=step.theorem, exact=step.exact)


def _converted(constant: float, call: Call, *, exact: bool) -> Step:
    price = convert("l2", call.norm, call.state)
    if math.isinf(price):
        return Step(constant=math.inf, reason="its number of tokens is not known")
    return Step(constant=constant * price, theorem="2-norm, converted", exact=exact)


def _channels_first(layer) -> bool:
    return layer.data_format == "channels_first"


def _spatial(shape, first: bool):
    return list(shape[1:] if first else shape[:-1])


def _each(value, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if np.ndim(value) == 0 else tuple(int(v) for v in value)
