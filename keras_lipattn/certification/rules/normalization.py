"""Normalizations: the Jacobian's norm where the scale is smallest (docs/theory.md, section 8).

LayerNormalization is `diag(gamma) C n(x)` with the centering `C` and the map `n` of constant
`1 / sqrt(epsilon)` whose values have norm at most `sqrt(d)`. Keeping the two parts apart lets the
matrix `C diag(gamma)` merge with the linear map that follows.
"""

import dataclasses
import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import Affine, LipschitzMap, chain, unbounded
from keras_lipattn.certification.reasons import (
    NOT_FINITE,
    UNKNOWN_TOKENS,
    Cause,
    Reason,
    in_training,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.activations import convert
from keras_lipattn.certification.rules.linear import matrix_map, scaling_map
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import cast_to_compute_dtype
from keras_lipattn.linalg import SAFETY

_RMS_SCALING = Reason(
    "with `rms_scaling=True` it divides by the root of the variance without subtracting the mean, "
    "and that is unbounded",
    replacement="keras.layers.RMSNormalization",
)
# Beyond this width the matrix C diag(gamma) is not formed; max |gamma| is an upper bound.
_WIDEST = 4096


@register_rule(keras.layers.LayerNormalization)
def layer_normalization(layer, call):
    if layer.rms_scaling:
        return unbounded(_RMS_SCALING)
    gamma = None if layer.gamma is None else cast_to_compute_dtype(layer.gamma, None)
    beta = None if layer.beta is None else cast_to_compute_dtype(layer.beta, None)
    return _normalize(gamma, beta, layer.axis, layer.epsilon, call, centered=True)


@register_rule(keras.layers.RMSNormalization)
def rms_normalization(layer, call):
    axis = getattr(layer, "axis", -1)
    return _normalize(
        cast_to_compute_dtype(layer.scale, layer.compute_dtype),
        None,
        axis,
        layer.epsilon,
        call,
        centered=False,
    )


@register_operation("LayerNorm", "RMSNorm")
def normalization_operation(operation, call):
    centered = type(operation).__name__ == "LayerNorm"
    gamma, beta = call.argument("gamma" if centered else "scale"), call.argument("beta")
    if len(call.states) != 1 or any(isinstance(one, TensorState) for one in (gamma, beta)):
        return unbounded("its scales are not constants of the model")
    if getattr(operation, "rms_scaling", False):
        return unbounded(_RMS_SCALING)
    gamma = None if gamma is None else call.constant(gamma)
    beta = None if beta is None else call.constant(beta)
    epsilon = keras.backend.epsilon() if operation.epsilon is None else operation.epsilon
    return _normalize(gamma, beta, operation.axis, epsilon, call, centered=centered)


def _normalize(
    gamma, beta, axis, epsilon: float, call: LayerCall, *, centered: bool
) -> LipschitzMap:
    state = call.state
    rank = state.rank
    axes = {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    if 0 in axes:
        return unbounded("it normalizes over the batch axis", cause=Cause.BATCH)
    if not epsilon > 0.0:
        return unbounded("its epsilon is not positive")
    gamma = np.ones(1) if gamma is None else gamma.reshape(-1)
    if not np.isfinite(gamma).all() or (beta is not None and not np.isfinite(beta).all()):
        return unbounded(NOT_FINITE)
    width = product(tuple(state.shape[a - 1] for a in sorted(axes)))
    if width is None:
        return unbounded("the size of the axes it normalizes is not known", cause=Cause.SIZE)
    name = "centered and divided" if centered else "divided"
    if axes != {rank - 1}:
        gamma = np.broadcast_to(gamma, (width,)) if gamma.size in (1, width) else gamma
        return _over_other_axes(gamma, beta, epsilon, width, call, centered=centered)
    gamma = np.broadcast_to(gamma, (width,))
    root = 1.0 / _smallest_divisor(epsilon, state, centered=centered)
    divide = LipschitzMap(
        constant=SAFETY * root * (1.0 if call.norm != "linf" else math.sqrt(width)),
        theorem=f"{name} by at least sqrt(epsilon)",
        exact=call.norm != "linf",
        range=TokenRange(SAFETY * math.sqrt(width), None, SAFETY * math.sqrt(width)),
    )
    if not centered:
        scale = scaling_map(gamma, call, theorem="largest |gamma|")
        return chain(
            divide,
            scale,
            theorem="max |gamma| / sqrt(epsilon)",
            exact=call.norm != "linf",
        )
    if width > _WIDEST:
        scale = scaling_map(gamma, call, theorem="largest |gamma|")
        return chain(divide, scale, theorem="max |gamma| / sqrt(epsilon)")
    matrix = np.diag(gamma) - gamma[None, :] / width
    offset = None if beta is None else np.broadcast_to(beta.reshape(-1), (width,))
    spread = matrix_map(
        matrix, offset, call.norm, spectral=layer_constants.centered_diagonal_norm(gamma)
    )
    direct = None
    if call.norm == "linf":
        # A row of the Jacobian has 2-norm at most |gamma_i| sqrt((d - 1) / d) / sqrt(epsilon).
        direct = SAFETY * root * math.sqrt(max(width - 1, 0)) * float(np.abs(gamma).max())
    return chain(
        divide,
        spread,
        constant=direct,
        theorem="norm of diag(gamma) (I - 11^T/d) / sqrt(epsilon)",
        exact=call.norm != "linf",
    )


def _smallest_divisor(epsilon: float, state: TensorState, *, centered: bool) -> float:
    """Smallest divisor of a token: of any token, or of those in the enclosure of the input."""
    if state.enclosure is None:
        return math.sqrt(epsilon)
    tokens = np.asarray(state.enclosure.value, np.float64)
    if centered:
        # Centering is a projection and does not enlarge differences.
        tokens = tokens - tokens.mean(axis=-1, keepdims=True)
    sizes = np.linalg.norm(tokens, axis=-1) / SAFETY - state.enclosure.radius
    smallest = max(float(sizes.min(initial=math.inf)), 0.0)
    nearby = math.sqrt(smallest**2 / tokens.shape[-1] + epsilon) / SAFETY
    return max(nearby, math.sqrt(epsilon))


def _over_other_axes(
    gamma, beta, epsilon: float, width: int, call: LayerCall, *, centered: bool
) -> LipschitzMap:
    """The map of a normalization over axes other than the last one."""
    constant = SAFETY * float(np.abs(gamma).max()) / math.sqrt(epsilon)
    if centered and width == 1:
        constant = 0.0
    token_range = _normalized_range(gamma, beta, width, call)
    if call.norm == "linf":
        # Every output depends on `width` entries, with a gradient of at most this 2-norm.
        return LipschitzMap(
            constant=constant * math.sqrt(width), theorem="2-norm, converted", range=token_range
        )
    price = convert("l2", call.norm, call.state)
    if math.isinf(price):
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(
        constant=constant * price,
        theorem="max |gamma| / sqrt(epsilon)" if price == 1.0 else "2-norm, converted",
        range=token_range,
    )


def _normalized_range(gamma, beta, width: int | None, call: LayerCall) -> TokenRange | None:
    """The range of `gamma n + beta` for vectors `n` of size `width`, mean square at most 1."""
    if width is None:
        return None
    offset = 0.0 if beta is None else float(np.abs(beta).max(initial=0.0))
    largest = SAFETY * math.sqrt(width) * float(np.abs(gamma).max(initial=0.0)) + offset
    return TokenRange.up_to(largest, call.width)


@register_rule(keras.layers.GroupNormalization)
def group_normalization(layer, call):
    if layer.axis % call.state.rank == 0:
        return unbounded("it normalizes over the batch axis", cause=Cause.BATCH)
    if not layer.epsilon > 0.0:
        return unbounded("its epsilon is not positive")
    gamma = np.ones(1) if layer.gamma is None else cast_to_compute_dtype(layer.gamma, None)
    beta = None if layer.beta is None else cast_to_compute_dtype(layer.beta, None)
    if not np.isfinite(gamma).all() or (beta is not None and not np.isfinite(beta).all()):
        return unbounded(NOT_FINITE)
    constant = SAFETY * float(np.abs(gamma).max()) / math.sqrt(layer.epsilon)
    price = convert("l2", call.norm, call.state)
    if math.isinf(price):
        return unbounded(UNKNOWN_TOKENS)
    # No group has more entries than an example.
    return LipschitzMap(
        constant=constant * price,
        theorem="max |gamma| / sqrt(epsilon)",
        range=_normalized_range(gamma, beta, call.state.entries, call),
    )


@register_rule(keras.layers.BatchNormalization)
def batch_normalization(layer, call):
    if call.training and layer.trainable:
        return unbounded(in_training("it normalizes with the statistics of the batch"))
    variance = cast_to_compute_dtype(layer.moving_variance, None)
    mean = cast_to_compute_dtype(layer.moving_mean, None)
    gamma = (
        np.ones_like(variance) if layer.gamma is None else cast_to_compute_dtype(layer.gamma, None)
    )
    beta = (
        np.zeros_like(variance) if layer.beta is None else cast_to_compute_dtype(layer.beta, None)
    )
    total = variance + layer.epsilon
    if not (total > 0.0).all() or not np.isfinite([gamma, beta, mean, variance]).all():
        return unbounded(
            "its moving variance is not positive, or its weights are not finite", remedy=""
        )
    scale = gamma / np.sqrt(total)
    rank = call.state.rank
    constant = layer_constants.batch_normalization_constant(gamma, variance, layer.epsilon)
    theorem = "max |gamma| / sqrt(variance + epsilon)"
    if layer.axis % rank != rank - 1:
        token_range = None
        if call.state.range.bounded and call.state.width is not None:
            shift = float(np.abs(beta - mean * scale).max())
            token_range = TokenRange(
                constant * call.state.range.outer_radius + math.sqrt(call.state.width) * shift
            )
        return LipschitzMap(constant=constant, theorem=theorem, exact=True, range=token_range)
    return Affine(
        constant=constant,
        theorem=theorem,
        exact=True,
        matrix=scale,
        bias=beta - mean * scale,
    )


@register_rule(keras.layers.UnitNormalization)
def unit_normalization(layer, call):
    return _unit(layer.axis, 1e-12, call)


@register_operation("Normalize")
def normalize_operation(operation, call):
    if operation.order != 2:
        return unbounded(f"the norm of order {operation.order} has no rule", cause=Cause.NO_RULE)
    epsilon = keras.backend.epsilon() if operation.epsilon is None else operation.epsilon
    return _unit(operation.axis, epsilon, call)


def _unit(axis, epsilon: float, call: LayerCall) -> LipschitzMap:
    state = call.state
    rank = state.rank
    axes = {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    if 0 in axes:
        return unbounded("it normalizes over the batch axis", cause=Cause.BATCH)
    if not epsilon > 0.0:
        return unbounded("its epsilon is not positive")
    last = axes == {rank - 1}
    constant = SAFETY / epsilon
    if last and state.enclosure is not None:
        # x / |x| has the Jacobian of a projection over |x|.
        sizes = np.linalg.norm(state.enclosure.value, axis=-1) / SAFETY - state.enclosure.radius
        constant = SAFETY / max(float(sizes.min(initial=math.inf)), epsilon)
    if call.norm != "l2" and not (last and call.norm == "token"):
        constant *= convert("l2", call.norm, state)
    if math.isinf(constant):
        return unbounded(UNKNOWN_TOKENS)
    token_range = TokenRange(1.0, None, 1.0) if last else TokenRange.up_to(1.0, state.width)
    exact = last and call.norm != "linf"
    return LipschitzMap(constant=constant, theorem="1 / epsilon", exact=exact, range=token_range)


@register_rule(keras.layers.Normalization)
def feature_normalization(layer, call):
    mean, variance = (
        cast_to_compute_dtype(value, layer.compute_dtype) for value in (layer.mean, layer.variance)
    )
    spread = np.maximum(np.sqrt(variance), keras.backend.epsilon())
    scale = spread if layer.invert else 1.0 / spread
    if not np.isfinite(mean).all():
        return unbounded(NOT_FINITE)
    offset = mean if layer.invert else -mean * scale
    return _shifted(scale, offset, call, theorem="largest scale")


@register_rule(keras.layers.Rescaling)
def rescaling(layer, call):
    scale = cast_to_compute_dtype(layer.scale, layer.compute_dtype)
    offset = cast_to_compute_dtype(layer.offset, layer.compute_dtype)
    return _shifted(scale, offset, call, theorem="|scale|")


def _keeps_shape(shape: tuple[int, ...], example: tuple[int | None, ...]) -> bool:
    """Whether an array of this shape has no effect on the shape of a batch of examples."""
    beyond = len(shape) - len(example)
    aligned = zip(shape[::-1], example[::-1], strict=False)
    return (
        all(size == 1 for size in shape[: max(beyond, 0)])
        and beyond <= 1
        and all(size in (1, other) for size, other in aligned)
    )


def _shifted(scale, offset, call: LayerCall, *, theorem: str) -> LipschitzMap:
    """The map of `scale * x + offset`, entry by entry."""
    if not all(_keeps_shape(array.shape, call.state.shape) for array in (scale, offset)):
        return unbounded(
            "its scale or offset has a larger shape than its input",
            remedy="repeat the input first, by `keras.ops.repeat`",
        )
    layer_map = scaling_map(scale, call, theorem=theorem)
    width = call.state.width or 0
    along_last = offset.size == 1 or offset.shape[-1] == offset.size == width
    if isinstance(layer_map, Affine) and along_last and np.isfinite(offset).all():
        return dataclasses.replace(layer_map, bias=np.broadcast_to(offset.reshape(-1), (width,)))
    token_range = None
    if call.state.range.bounded and width and math.isfinite(layer_map.constant):
        shift = math.sqrt(width) * float(np.abs(offset).max())
        token_range = TokenRange(
            SAFETY * (layer_map.constant * call.state.range.outer_radius + shift)
        )
    return LipschitzMap(
        constant=layer_map.constant,
        theorem=layer_map.theorem,
        reason=layer_map.reason,
        exact=layer_map.exact,
        range=token_range,
    )
