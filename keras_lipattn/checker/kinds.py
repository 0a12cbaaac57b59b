"""The kinds of steps that a proof may have: their values, and the bounds of their outputs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.checker import activations, attention, operations, token_kinds
from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.step import Step, Values
from keras_lipattn.checker.tensor_bounds import Ball, Bounds, combined, log_of, mapped
from keras_lipattn.linalg import SAFETY


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of step.

    Args:
        value: The output for given inputs and masks, in float64; arrays have a batch axis.
        bounds: The bounds of the output from those of the inputs, in a norm. The sizes of the
            output are filled in later.
        allowed: The operations of TensorFlow that may compute it.
        linear: Whether the served graph must multiply by constants only.
        fixed: Operations that the served graph may apply to what does not change.
        scales: Sizes of the random inputs that both are compared on.
        is_larger: Whether, for an input and a norm, the constant in another norm cannot help.
    """

    value: Callable[[Step, Values, Values], np.ndarray]
    bounds: Callable[[Step, list[Bounds], str, Bounds], Bounds]
    allowed: Callable[[Step], frozenset[str]]
    linear: Callable[[Step], bool] = lambda step: False
    fixed: frozenset[str] = frozenset()
    scales: Callable[[Step], tuple[float, ...]] = lambda step: (0.1, 1.0, 5.0)
    is_larger: Callable[[Step, Bounds, str, str], bool] = lambda step, state, norm, other: False


def _dense_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,), bias = inputs, step.optional("bias")
    y = x @ step.array("kernel")
    return activations.value(_activation(step), y if bias is None else y + bias)


def _dense_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    kernel = step.array("kernel")
    require(kernel.ndim == 2, f"{step.layer}: its kernel is no matrix")
    after = mapped(state, kernel, step.optional("bias"), norm)
    return activations.bounds(_activation(step), after, norm, step.layer)


def _activation(step: Step) -> str:
    name = step.parameters.get("activation", "linear")
    if name not in operations.ACTIVATIONS:
        raise NotVerified(f"no independent check of the activation {name!r} of {step.layer}")
    return name


def _center_matrix(step: Step) -> tuple[np.ndarray, np.ndarray]:
    width = step.integer("width")
    gamma = step.optional("gamma")
    gamma = np.ones(width) if gamma is None else gamma.reshape(-1)
    require(len(gamma) == width, f"{step.layer}: its scales do not fit its width")
    return gamma, np.diag(gamma) - gamma[None, :] / width


def _center_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    gamma, _ = _center_matrix(step)
    (x,), beta, width = inputs, step.optional("beta"), len(gamma)
    y = width / (width - 1.0) * (x - x.mean(-1, keepdims=True)) * gamma
    return y if beta is None else y + beta


def _center_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    gamma, matrix = _center_matrix(step)
    require(len(gamma) >= 2, f"{step.layer}: its tokens have one entry")
    require(states[0].width == len(gamma), f"{step.layer}: its scales do not fit its input")
    spectral = layer_constants.center_normalization_constant(gamma)
    return mapped(
        states[0],
        len(gamma) / (len(gamma) - 1.0) * matrix,
        step.optional("beta"),
        norm,
        constant=spectral if norm != "linf" else None,
        spectral=spectral if norm != "linf" else None,
    )


def _layer_norm_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    gamma, _ = _center_matrix(step)
    (x,), beta = inputs, step.optional("beta")
    centered = x - x.mean(-1, keepdims=True)
    spread = np.sqrt(np.square(centered).mean(-1, keepdims=True) + step.positive("epsilon"))
    y = centered / spread * gamma
    return y if beta is None else y + beta


def _layer_norm_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    gamma, matrix = _center_matrix(step)
    (state,), width = states, len(gamma)
    require(state.width == width, f"{step.layer}: its scales do not fit its input")
    root = 1.0 / math.sqrt(step.positive("epsilon"))
    divide = SAFETY * root * (1.0 if norm != "linf" else math.sqrt(width))
    reach = SAFETY * math.sqrt(width)
    inner = Bounds(state.log + log_of(divide), state.shape, state.varies, Ball(reach, None, reach))
    spectral = layer_constants.centered_diagonal_norm(gamma)
    after = mapped(
        inner,
        matrix,
        step.optional("beta"),
        norm,
        constant=spectral if norm != "linf" else None,
        spectral=spectral if norm != "linf" else None,
    )
    if norm == "linf":
        # The 2-norm of a row of the Jacobian.
        direct = SAFETY * root * math.sqrt(width - 1) * float(np.abs(gamma).max())
        after = dataclasses.replace(after, log=min(after.log, state.log + log_of(direct)))
    return after


def _rms_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,) = inputs
    spread = np.sqrt(np.square(x).mean(-1, keepdims=True) + step.positive("epsilon"))
    return x / spread * step.array("gamma")


def _rms_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,), gamma = states, step.array("gamma")
    width = state.width
    require(gamma.shape == (width,), f"{step.layer}: its scales do not fit its input")
    divide = SAFETY / math.sqrt(step.positive("epsilon"))
    divide *= 1.0 if norm != "linf" else math.sqrt(width)
    reach = SAFETY * math.sqrt(width)
    inner = Bounds(state.log + log_of(divide), state.shape, state.varies, Ball(reach, None, reach))
    return mapped(inner, None if (gamma == 1.0).all() else gamma, None, norm)


def _combination_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return sum(c * x for c, x in zip(_coefficients(step, inputs), inputs, strict=True))  # type: ignore


def _combination_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    require(
        all(state.shape == output.shape for state in states),
        f"no independent check of the broadcasting of {step.layer}",
    )
    return combined(states, _coefficients(step, states), norm)


def _coefficients(step: Step, inputs: list[Any]) -> list[float]:
    value = step.parameters.get("coefficients")
    fits = isinstance(value, list) and all(
        type(one) is float and math.isfinite(one) for one in value
    )
    require(fits, f"{step.layer}: its coefficients are {value!r}")
    assert isinstance(value, list)
    require(len(value) == len(inputs), f"{step.layer}: it has another number of inputs")
    return value


def _position_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return inputs[0] + step.array("table")[: inputs[0].shape[1]]


def _position_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    return mapped(states[0], None, step.array("table"), norm)


def _sort_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    first, second = np.split(inputs[0], 2, axis=-1)
    return np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=-1)


def _sort_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    return Bounds(state.log, state.shape, state.varies, state.ball.around_origin())


def _half_abs_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    first, second = np.split(inputs[0], 2, axis=-1)
    return np.concatenate([first, np.abs(second)], axis=-1)


def _distance_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    constant = attention.distance_constant(step, step.tokens(state), norm)
    return Bounds(state.log + log_of(constant), state.shape, state.varies)


def _cosine_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    constant = attention.cosine_constant(step, step.tokens(state), norm)
    return Bounds(state.log + log_of(constant), state.shape, state.varies)


def _with_activation(base: frozenset[str]) -> Callable[[Step], frozenset[str]]:
    return lambda step: base | operations.of_activation(_activation(step))


def _always(allowed: frozenset[str]) -> Callable[[Step], frozenset[str]]:
    return lambda step: allowed


def _linear(step: Step) -> bool:
    return True


def _has_no_product(step: Step) -> bool:
    """Whether the activation of a dense layer multiplies nothing."""
    products = {"Mul", "RealDiv", "Square"}
    return not products & set(operations.ACTIVATIONS[_activation(step)].split())


def _activation_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return activations.value(_activation(step), inputs[0])


def _activation_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    name = _activation(step)
    if name == "linear":
        return mapped(states[0], None, None, norm)
    return activations.bounds(name, states[0], norm, step.layer)


_ATTENTION = _always(operations.ATTENTION)

KINDS = {
    "activation": Kind(_activation_value, _activation_bounds, _with_activation(operations.MOVES)),
    "average_pooling": Kind(
        token_kinds.pool_value, token_kinds.pool_bounds, _always(operations.LINEAR), _linear
    ),
    "center_normalization": Kind(
        _center_value, _center_bounds, _always(operations.LINEAR), _linear
    ),
    "combination": Kind(
        _combination_value, _combination_bounds, _always(operations.LINEAR), _linear
    ),
    "cosine_attention": Kind(attention.cosine_value, _cosine_bounds, _ATTENTION),
    "dense": Kind(
        _dense_value, _dense_bounds, _with_activation(operations.LINEAR), _has_no_product
    ),
    "distance_attention": Kind(
        attention.distance_value,
        _distance_bounds,
        _ATTENTION,
        is_larger=lambda step, state, norm, other: attention.distance_is_larger(
            step, step.tokens(state), norm, other
        ),
    ),
    "dot_product_attention": Kind(
        attention.dot_product_value,
        lambda step, states, norm, output: attention.dot_product_bounds(step, states[0], norm),
        _ATTENTION,
    ),
    "global_average": Kind(
        token_kinds.average_value,
        token_kinds.average_bounds,
        _always(operations.AVERAGES),
        _linear,
        frozenset({"Maximum"}),
    ),
    "global_max": Kind(
        token_kinds.largest_value, token_kinds.largest_bounds, _always(operations.LARGEST)
    ),
    "half_abs": Kind(_half_abs_value, _sort_bounds, _always(operations.MOVES | {"Abs"})),
    "layer_normalization": Kind(
        _layer_norm_value,
        _layer_norm_bounds,
        _always(operations.NORMALIZATION),
        scales=lambda step: (0.3 * math.sqrt(step.positive("epsilon")), 1.0),
    ),
    "max_min": Kind(_sort_value, _sort_bounds, _always(operations.SORTING)),
    "max_pooling": Kind(
        token_kinds.pool_value, token_kinds.pool_bounds, _always(operations.LARGEST)
    ),
    "norm_pooling": Kind(
        token_kinds.norm_value, token_kinds.norm_bounds, _always(operations.NORMS)
    ),
    "permute": Kind(
        token_kinds.permute_value, token_kinds.permute_bounds, _always(operations.MOVES), _linear
    ),
    "positions": Kind(_position_value, _position_bounds, _always(operations.LINEAR), _linear),
    "rms_normalization": Kind(
        _rms_value,
        _rms_bounds,
        _always(operations.NORMALIZATION),
        scales=lambda step: (0.3 * math.sqrt(step.positive("epsilon")), 1.0),
    ),
    "reshape": Kind(
        token_kinds.reshape_value, token_kinds.reshape_bounds, _always(operations.MOVES), _linear
    ),
}
