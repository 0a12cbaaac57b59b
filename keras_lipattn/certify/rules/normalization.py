"""Normalisations: the Jacobian's norm where the scale is smallest (docs/theory.md, section 8).

LayerNormalization is `diag(gamma) C n(x)` with the centring `C` and the map `n` of constant
`1 / sqrt(epsilon)` whose values have norm at most `sqrt(d)`. Keeping the two parts apart lets the
matrix `C diag(gamma)` merge with the linear map that follows.
"""

import dataclasses
import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.linear_map import centred_diagonal_norm
from keras_lipattn.certify.registry import register_operation, register_rule
from keras_lipattn.certify.rules.activations import convert
from keras_lipattn.certify.rules.linear import NOT_FINITE, matrix_step, scaling_step
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState, product
from keras_lipattn.certify.weights import as_run
from keras_lipattn.linalg import SAFETY

# Beyond this width the matrix C diag(gamma) is not formed; max |gamma| is an upper bound.
_WIDEST = 4096


@register_rule(keras.layers.LayerNormalization)
def layer_normalization(layer, call):
    if layer.rms_scaling:
        return Step(
            constant=math.inf,
            reason="with `rms_scaling=True` it divides by the centred variance without centring, "
            "which is unbounded; RMSNormalization is what it means to be",
        )
    gamma = None if layer.gamma is None else as_run(layer.gamma, None)
    beta = None if layer.beta is None else as_run(layer.beta, None)
    return _normalise(gamma, beta, layer.axis, layer.epsilon, call, centred=True)


@register_rule(keras.layers.RMSNormalization)
def rms_normalization(layer, call):
    axis = getattr(layer, "axis", -1)
    return _normalise(
        as_run(layer.scale, layer.compute_dtype), None, axis, layer.epsilon, call, centred=False
    )


@register_operation("LayerNorm", "RMSNorm")
def normalization_operation(operation, call):
    named = {"gamma": None, "scale": None, "beta": None, **call.kwargs}
    gamma, beta = (
        [*call.args[1:], None, None][:2]
        if len(call.args) > 1
        else (named["gamma"] if named["scale"] is None else named["scale"], named["beta"])
    )
    if len(call.states) != 1:
        return Step(constant=math.inf, reason="its scales are not constants of the model")
    centred = type(operation).__name__ == "LayerNorm"
    if getattr(operation, "rms_scaling", False):
        return Step(constant=math.inf, reason="rms_scaling is unbounded")
    gamma = None if gamma is None else call.constant(gamma)
    beta = None if beta is None else call.constant(beta)
    epsilon = keras.backend.epsilon() if operation.epsilon is None else operation.epsilon
    return _normalise(gamma, beta, operation.axis, epsilon, call, centred=centred)


def _normalise(gamma, beta, axis, epsilon: float, call: Call, *, centred: bool) -> Step:
    state = call.state
    rank = len(state.shape) + 1
    axes = {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    if 0 in axes:
        return Step(constant=math.inf, reason="it normalises over the batch axis")
    if not epsilon > 0.0:
        return Step(constant=math.inf, reason="its epsilon is not positive")
    gamma = np.ones(1) if gamma is None else gamma.reshape(-1)
    if not np.isfinite(gamma).all() or (beta is not None and not np.isfinite(beta).all()):
        return Step(constant=math.inf, reason=NOT_FINITE)
    width = product(tuple(state.shape[a - 1] for a in sorted(axes)))
    if width is None:
        return Step(constant=math.inf, reason="the size of the axes it normalises is not known")
    name = "centred and divided" if centred else "divided"
    if axes != {rank - 1}:
        gamma = np.broadcast_to(gamma, (width,)) if gamma.size in (1, width) else gamma
        return _over_other_axes(gamma, epsilon, width, call, centred=centred)
    gamma = np.broadcast_to(gamma, (width,))
    root = 1.0 / _smallest_divisor(epsilon, state, centred=centred)
    divide = Step(
        constant=SAFETY * root * (1.0 if call.norm != "linf" else math.sqrt(width)),
        theorem=f"{name} by at least sqrt(epsilon)",
        exact=call.norm != "linf",
        domain=Domain(SAFETY * math.sqrt(width), None, SAFETY * math.sqrt(width)),
    )
    if not centred:
        scale = scaling_step(gamma, call, theorem="largest |gamma|")
        return Step.chain(
            divide,
            scale,
            theorem="max |gamma| / sqrt(epsilon)",
            exact=call.norm != "linf",
        )
    if width > _WIDEST:
        scale = scaling_step(gamma, call, theorem="largest |gamma|")
        return Step.chain(divide, scale, theorem="max |gamma| / sqrt(epsilon)")
    matrix = np.diag(gamma) - gamma[None, :] / width
    offset = None if beta is None else np.broadcast_to(beta.reshape(-1), (width,))
    spread = matrix_step(matrix, offset, call.norm, spectral=centred_diagonal_norm(gamma))
    direct = None
    if call.norm == "linf":
        # A row of the Jacobian has 2-norm at most |gamma_i| sqrt((d - 1) / d) / sqrt(epsilon).
        direct = SAFETY * root * math.sqrt(max(width - 1, 0)) * float(np.abs(gamma).max())
    return Step.chain(
        divide,
        spread,
        constant=direct,
        theorem="norm of diag(gamma) (I - 11^T/d) / sqrt(epsilon)",
        exact=call.norm != "linf",
    )


def _smallest_divisor(epsilon: float, state: TensorState, *, centred: bool) -> float:
    """The least that a token is divided by: of all tokens, or of those near a known input."""
    if state.near is None:
        return math.sqrt(epsilon)
    tokens = np.asarray(state.near.value, np.float64)
    if centred:
        # Centring never takes a token further than the token itself moves.
        tokens = tokens - tokens.mean(axis=-1, keepdims=True)
    sizes = np.linalg.norm(tokens, axis=-1) / SAFETY - state.near.radius
    smallest = max(float(sizes.min(initial=math.inf)), 0.0)
    nearby = math.sqrt(smallest**2 / tokens.shape[-1] + epsilon) / SAFETY
    return max(nearby, math.sqrt(epsilon))


def _over_other_axes(gamma, epsilon: float, width: int, call: Call, *, centred: bool) -> Step:
    """Normalisation over axes other than the last one: an upper bound in the 2-norm."""
    constant = SAFETY * float(np.abs(gamma).max()) / math.sqrt(epsilon)
    if centred and width == 1:
        constant = 0.0
    if call.norm == "linf":
        # Every output depends on `width` entries, with a gradient of at most this 2-norm.
        return Step(constant=constant * math.sqrt(width), theorem="2-norm, converted")
    price = convert("l2", call.norm, call.state)
    if math.isinf(price):
        return Step(constant=math.inf, reason="its number of tokens is not known")
    return Step(
        constant=constant * price,
        theorem="max |gamma| / sqrt(epsilon)" if price == 1.0 else "2-norm, converted",
    )


@register_rule(keras.layers.GroupNormalization)
def group_normalization(layer, call):
    if not layer.epsilon > 0.0:
        return Step(constant=math.inf, reason="its epsilon is not positive")
    gamma = np.ones(1) if layer.gamma is None else as_run(layer.gamma, None)
    if not np.isfinite(gamma).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    constant = SAFETY * float(np.abs(gamma).max()) / math.sqrt(layer.epsilon)
    price = convert("l2", call.norm, call.state)
    if math.isinf(price):
        return Step(constant=math.inf, reason="its number of tokens is not known")
    return Step(constant=constant * price, theorem="max |gamma| / sqrt(epsilon)")


@register_rule(keras.layers.BatchNormalization)
def batch_normalization(layer, call):
    if call.training and layer.trainable:
        return Step(
            constant=math.inf,
            reason="the graph calls it with `training=True`: it normalises with the batch",
        )
    variance = as_run(layer.moving_variance, None)
    mean = as_run(layer.moving_mean, None)
    gamma = np.ones_like(variance) if layer.gamma is None else as_run(layer.gamma, None)
    beta = np.zeros_like(variance) if layer.beta is None else as_run(layer.beta, None)
    total = variance + layer.epsilon
    if not (total > 0.0).all() or not np.isfinite([gamma, beta, mean, variance]).all():
        return Step(
            constant=math.inf,
            reason="its moving variance is not positive, or its weights are not finite",
        )
    scale = gamma / np.sqrt(total)
    rank = len(call.state.shape) + 1
    constant = layer_constants.batch_normalization_constant(gamma, variance, layer.epsilon)
    theorem = "max |gamma| / sqrt(variance + epsilon)"
    if layer.axis % rank != rank - 1:
        return Step(constant=constant, theorem=theorem, exact=True)
    return Step(
        constant=constant,
        theorem=theorem,
        exact=True,
        is_linear_map=True,
        matrix=scale,
        bias=beta - mean * scale,
    )


@register_rule(keras.layers.UnitNormalization)
def unit_normalization(layer, call):
    return _unit(layer.axis, 1e-12, call)


@register_operation("Normalize")
def normalize_operation(operation, call):
    if operation.order != 2:
        return Step(constant=math.inf, reason=f"no rule for the order {operation.order}")
    epsilon = keras.backend.epsilon() if operation.epsilon is None else operation.epsilon
    return _unit(operation.axis, epsilon, call)


def _unit(axis, epsilon: float, call: Call) -> Step:
    state = call.state
    rank = len(state.shape) + 1
    axes = {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    if 0 in axes or not epsilon > 0.0:
        return Step(
            constant=math.inf, reason="it normalises over the batch axis, or its epsilon is 0"
        )
    last = axes == {rank - 1}
    constant = SAFETY / epsilon
    if last and state.near is not None:
        # x / |x| has the Jacobian of a projection over |x|.
        sizes = np.linalg.norm(state.near.value, axis=-1) / SAFETY - state.near.radius
        constant = SAFETY / max(float(sizes.min(initial=math.inf)), epsilon)
    if call.norm != "l2" and not (last and call.norm == "token"):
        constant *= convert("l2", call.norm, state)
    if math.isinf(constant):
        return Step(constant=math.inf, reason="its number of tokens is not known")
    domain = Domain(1.0, None, 1.0) if last else None
    exact = last and call.norm != "linf"
    return Step(constant=constant, theorem="1 / epsilon", exact=exact, domain=domain)


@register_rule(keras.layers.Normalization)
def feature_normalization(layer, call):
    mean, variance = (as_run(value, layer.compute_dtype) for value in (layer.mean, layer.variance))
    spread = np.maximum(np.sqrt(variance), keras.backend.epsilon())
    scale = spread if layer.invert else 1.0 / spread
    if not np.isfinite(mean).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    step = scaling_step(np.squeeze(scale), call, theorem="largest scale")
    return Step(constant=step.constant, theorem=step.theorem, reason=step.reason, exact=step.exact)


@register_rule(keras.layers.Rescaling)
def rescaling(layer, call):
    scale = as_run(layer.scale, layer.compute_dtype)
    offset = as_run(layer.offset, layer.compute_dtype)
    step = scaling_step(scale, call, theorem="|scale|")
    if offset.size == 1 and step.is_linear_map and call.state.width is not None:
        return dataclasses.replace(
            step, bias=np.full(call.state.width, float(offset.reshape(-1)[0]))
        )
    return Step(constant=step.constant, theorem=step.theorem, reason=step.reason, exact=step.exact)
