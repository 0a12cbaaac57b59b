"""The kinds of steps that a proof may have: their values, and the bounds of their outputs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.checker import activations, attention, operations
from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.served_function import Region
from keras_lipattn.checker.tensor_bounds import Ball, Bounds, combined, log_of, mapped
from keras_lipattn.linalg import SAFETY

Values = list[np.ndarray]


class Step:
    """One step of a proof, with the arrays that the served graph has for it.

    Args:
        entry: The step in the proof.
        region: The operations of the served graph between its tensors.
    """

    def __init__(self, entry: dict[str, Any], region: Region):
        self.kind: str = entry["kind"]
        self.layer: str = entry["layer"]
        self.parameters: dict[str, Any] = entry["parameters"]
        self._arrays = {
            name: _served(name, stated, region, self.layer)
            for name, stated in entry["arrays"].items()
        }

    def array(self, name: str) -> np.ndarray:
        """An array of the step, in float64."""
        require(name in self._arrays, f"{self.layer}: the proof names no array {name!r}")
        return self._arrays[name]

    def optional(self, name: str) -> np.ndarray | None:
        """An array of the step, or `None`."""
        return self._arrays.get(name)

    def number(self, name: str) -> float:
        """A finite parameter."""
        value = self.parameters.get(name)
        fits = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
        require(fits, f"{self.layer}: parameter {name} is {value!r}")
        return float(value)  # type: ignore[arg-type]

    def positive(self, name: str) -> float:
        """A positive parameter."""
        value = self.number(name)
        require(value > 0.0, f"{self.layer}: parameter {name} is {value!r}")
        return value

    def integer(self, name: str) -> int:
        """A positive integer parameter."""
        value = self.parameters.get(name)
        require(type(value) is int and value >= 1, f"{self.layer}: parameter {name} is {value!r}")
        assert isinstance(value, int)
        return value

    def integers(self, name: str) -> list[int]:
        """A parameter that is a list of positive integers."""
        value = self.parameters.get(name)
        fits = isinstance(value, list) and all(type(one) is int and one >= 1 for one in value)
        require(fits, f"{self.layer}: parameter {name} is {value!r}")
        assert isinstance(value, list)
        return value

    def sizes(self, name: str, count: int) -> np.ndarray:
        """Numbers of at least 0, one for each head; they only make a constant larger."""
        value = np.asarray(self.parameters.get(name, [0.0] * count), np.float64)
        require(
            value.shape == (count,) and bool((value >= 0.0).all() and np.isfinite(value).all()),
            f"{self.layer}: parameter {name} is no list of {count} sizes",
        )
        return value

    def axes(self, rank: int) -> list[int]:
        """Axes of attention in a tensor of this rank."""
        axes = self.integers("axes")
        fits = len(set(axes)) == len(axes) > 0 and all(axis < rank - 1 for axis in axes)
        require(fits and axes == sorted(axes), f"{self.layer}: its axes are {axes}")
        return axes

    def tokens(self, state: Bounds) -> int:
        """Largest number of tokens that attend to each other."""
        axes = self.axes(len(state.shape) + 1)
        return math.prod(state.shape[axis - 1] for axis in axes)


def _served(name: str, stated: Any, region: Region, layer: str) -> np.ndarray:
    require(
        isinstance(stated, dict) and isinstance(stated.get("shape"), list),
        f"{layer}: array {name!r} has no shape",
    )
    found = region.constants.get(stated.get("sha256"))
    if found is None:
        raise NotVerified(f"{layer}: the served graph has no array with the SHA-256 of {name!r}")
    shape = stated["shape"]
    fits = all(type(size) is int and size >= 0 for size in shape)
    require(fits and math.prod(shape) == found.size, f"{layer}: array {name!r} has another shape")
    require(bool(np.isfinite(found).all()), f"{layer}: array {name!r} is not finite")
    return found.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of step.

    Args:
        value: The output for given inputs and masks, in float64; arrays have a batch axis.
        bounds: The bounds of the output from those of the inputs, in a norm. The sizes of the
            output are filled in later.
        allowed: The operations of TensorFlow that may compute it.
        linear: Whether the served graph must be linear in its inputs.
        scales: Sizes of the random inputs that both are compared on.
    """

    value: Callable[[Step, Values, Values], np.ndarray]
    bounds: Callable[[Step, list[Bounds], str, Bounds], Bounds]
    allowed: Callable[[Step], frozenset[str]]
    linear: bool = False
    scales: Callable[[Step], tuple[float, ...]] = lambda step: (0.1, 1.0, 5.0)


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
    require(len(gamma) == width >= 2, f"{step.layer}: its scales do not fit its width")
    return gamma, np.diag(gamma) - gamma[None, :] / width


def _center_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    gamma, _ = _center_matrix(step)
    (x,), beta, width = inputs, step.optional("beta"), len(gamma)
    y = width / (width - 1.0) * (x - x.mean(-1, keepdims=True)) * gamma
    return y if beta is None else y + beta


def _center_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    gamma, matrix = _center_matrix(step)
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


def _reshape_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    shape = step.parameters.get("shape")
    require(isinstance(shape, list), f"{step.layer}: it has no shape")
    try:
        return inputs[0].reshape(len(inputs[0]), *shape)  # type: ignore[misc]
    except (TypeError, ValueError) as error:
        raise NotVerified(f"{step.layer}: its shape is {shape!r}") from error


def _reshape_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,), old, new = states, states[0].width, output.width
    require(not any(state.varies), f"no independent check of {step.layer} for varying lengths")
    if old == new and not step.parameters.get("flatten"):
        return _tokens_mixed(state, 1.0, state.ball, output)
    if step.parameters.get("flatten"):
        merged = state.tokens
    elif new <= old and old % new == 0:
        merged = 1
    elif new % old == 0:
        merged = new // old
    else:
        merged = (new - 2) // old + 2
    return _regrouped(state, min(merged, state.tokens), norm)


def _permute_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return np.transpose(inputs[0], [0, *_order(step, inputs[0].ndim)])


def _order(step: Step, rank: int) -> list[int]:
    order = step.integers("order")
    require(sorted(order) == list(range(1, rank)), f"{step.layer}: its order is {order}")
    return order


def _permute_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    if _order(step, len(state.shape) + 1)[-1] == len(state.shape):
        return _tokens_mixed(state, 1.0, state.ball, output)
    return _regrouped(state, output.width, norm)


def _regrouped(state: Bounds, merged: int, norm: str) -> Bounds:
    """Each token of the output has parts of `merged` tokens of the input."""
    constant = layer_constants.regroup_constant(norm, merged)
    ball = Ball()
    if math.isfinite(state.ball.radius):
        ball = Ball(SAFETY * math.sqrt(merged) * state.ball.reach, None, state.ball.largest)
    return Bounds(state.log + log_of(constant), state.shape, state.varies, ball)


def _tokens_mixed(state: Bounds, constant: float, ball: Ball, output: Bounds) -> Bounds:
    """A linear map over tokens, the same for every channel; it commutes with maps of channels."""
    anchor = None
    if state.anchor is not None:
        width = state.root.width
        anchor = Bounds(
            state.root.log + log_of(constant), (*output.shape[:-1], width), output.varies
        )
    return Bounds(
        state.log + log_of(constant),
        output.shape,
        output.varies,
        ball,
        anchor,
        None if anchor is None else state.linear,
    )


def _average_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,) = inputs
    axes = tuple(range(1, x.ndim - 1))
    if not masks:
        return x.mean(axis=axes)
    require(x.ndim == 3, f"no independent check of the masks of {step.layer}")
    weights = np.logical_and.reduce(masks)[..., None].astype(np.float64)
    return (x * weights).sum(axis=1) / weights.sum(axis=1)


def _average_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    sizes = zip(state.shape[:-1], state.varies[:-1], strict=True)
    fewest = math.prod(1 if varies else size for size, varies in sizes)
    if step.parameters.get("masked"):
        fewest = 1
    constant = layer_constants.global_average_constant(norm, fewest)
    return _tokens_mixed(state, constant, state.ball, output)


def _largest_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return inputs[0].max(axis=tuple(range(1, inputs[0].ndim - 1)))


def _largest_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    return _maxima(state, 1.0, state.tokens, norm)


def _maxima(state: Bounds, constant: float, window: int, norm: str) -> Bounds:
    if norm == "token":
        constant = SAFETY * math.sqrt(min(window, state.width))
    elif norm == "linf":
        constant = 1.0
    ball, largest = Ball(), SAFETY * state.ball.largest
    if math.isfinite(largest):
        ball = Ball.of_entries(-largest, largest, state.width)
    return Bounds(state.log + log_of(constant), state.shape, state.varies, ball)


def _windows(step: Step, length: int) -> list[slice]:
    """The windows of a pooling along one axis."""
    size, stride = step.integer("pool_size"), step.integer("strides")
    padding = step.parameters.get("padding")
    require(padding in ("valid", "same"), f"{step.layer}: its padding is {padding!r}")
    if padding == "valid":
        count, first = (length - size) // stride + 1, 0
    else:
        count = -(-length // stride)
        first = -(max((count - 1) * stride + size - length, 0) // 2)
    starts = [first + index * stride for index in range(count)]
    return [slice(max(start, 0), min(start + size, length)) for start in starts]


def _pool_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,) = inputs
    require(x.ndim == 3, f"no independent check of {step.layer}")
    reduce = np.max if step.kind == "max_pooling" else np.mean
    windows = _windows(step, x.shape[1])
    return np.stack([reduce(x[:, window], axis=1) for window in windows], axis=1)


def _pool_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    require(not any(state.varies), f"no independent check of {step.layer} for varying lengths")
    size = step.integer("pool_size")
    sizes: dict[str, Any] = {
        "pool_size": (size,),
        "strides": (step.integer("strides"),),
        "input_shape": state.shape[:1],
        "padding": step.parameters.get("padding"),
    }
    if step.kind == "average_pooling":
        constant = layer_constants.average_pooling_constant(norm, **sizes)
        return _tokens_mixed(state, constant, state.ball, output)
    constant = layer_constants.max_pooling_constant("l2", channels=1, **sizes)
    return _maxima(state, constant, size, norm)


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
    "average_pooling": Kind(_pool_value, _pool_bounds, _always(operations.LINEAR), True),
    "center_normalization": Kind(_center_value, _center_bounds, _always(operations.LINEAR), True),
    "combination": Kind(_combination_value, _combination_bounds, _always(operations.LINEAR), True),
    "cosine_attention": Kind(attention.cosine_value, _cosine_bounds, _ATTENTION),
    "dense": Kind(_dense_value, _dense_bounds, _with_activation(operations.LINEAR)),
    "distance_attention": Kind(attention.distance_value, _distance_bounds, _ATTENTION),
    "dot_product_attention": Kind(
        attention.dot_product_value,
        lambda step, states, norm, output: attention.dot_product_bounds(step, states[0], norm),
        _ATTENTION,
    ),
    "global_average": Kind(_average_value, _average_bounds, _always(operations.AVERAGES)),
    "global_max": Kind(_largest_value, _largest_bounds, _always(operations.LARGEST)),
    "layer_normalization": Kind(
        _layer_norm_value,
        _layer_norm_bounds,
        _always(operations.NORMALIZATION),
        scales=lambda step: (0.3 * math.sqrt(step.positive("epsilon")), 1.0),
    ),
    "max_min": Kind(_sort_value, _sort_bounds, _always(operations.SORTING)),
    "max_pooling": Kind(_pool_value, _pool_bounds, _always(operations.LARGEST)),
    "permute": Kind(_permute_value, _permute_bounds, _always(operations.MOVES), True),
    "positions": Kind(_position_value, _position_bounds, _always(operations.LINEAR), True),
    "reshape": Kind(_reshape_value, _reshape_bounds, _always(operations.MOVES), True),
}
