"""Kinds of steps that move, average or select tokens: their values and bounds."""

import math
from typing import Any

import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.step import Step, Values
from keras_lipattn.checker.tensor_bounds import Ball, Bounds, log_of
from keras_lipattn.linalg import SAFETY

# Smaller norms of a pooling become this.
_LEAST_NORM = 2e-19


def reshape_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    shape = step.parameters.get("shape")
    require(isinstance(shape, list), f"{step.layer}: it has no shape")
    try:
        return inputs[0].reshape(len(inputs[0]), *shape)  # type: ignore[misc]
    except (TypeError, ValueError) as error:
        raise NotVerified(f"{step.layer}: its shape is {shape!r}") from error


def reshape_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
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


def permute_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return np.transpose(inputs[0], [0, *_order(step, inputs[0].ndim)])


def _order(step: Step, rank: int) -> list[int]:
    order = step.integers("order")
    require(sorted(order) == list(range(1, rank)), f"{step.layer}: its order is {order}")
    return order


def permute_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
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


def average_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,) = inputs
    axes = tuple(range(1, x.ndim - 1))
    if not masks:
        return x.mean(axis=axes)
    require(x.ndim == 3, f"no independent check of the masks of {step.layer}")
    weights = np.logical_and.reduce(masks)[..., None].astype(np.float64)
    return (x * weights).sum(axis=1) / weights.sum(axis=1)


def average_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    sizes = zip(state.shape[:-1], state.varies[:-1], strict=True)
    fewest = math.prod(1 if varies else size for size, varies in sizes)
    if step.parameters.get("masked"):
        fewest = 1
    constant = layer_constants.global_average_constant(norm, fewest)
    return _tokens_mixed(state, constant, state.ball, output)


def largest_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    return inputs[0].max(axis=tuple(range(1, inputs[0].ndim - 1)))


def largest_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
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


def norm_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,), window = inputs, step.integers("window")
    sides = x.shape[1:-1]
    require(
        len(window) == len(sides) and not any(n % w for n, w in zip(sides, window, strict=True)),
        f"{step.layer}: its windows do not fit its input",
    )
    blocks = [part for n, w in zip(sides, window, strict=True) for part in (n // w, w)]
    x = x.reshape(len(x), *blocks, x.shape[-1])
    norms = np.sqrt(np.square(x).sum(axis=tuple(range(2, x.ndim - 1, 2))))
    norms = np.maximum(norms, _LEAST_NORM)
    return norms.reshape(len(x), -1) if step.parameters.get("all") else norms


def norm_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
    (state,) = states
    require(not any(state.varies), f"no independent check of {step.layer} for varying lengths")
    root = SAFETY * math.sqrt(math.prod(step.integers("window")))
    reach = root * state.ball.reach + _LEAST_NORM * math.sqrt(state.width)
    ball = Ball(reach, None, root * state.ball.largest + _LEAST_NORM)
    constant = 1.0 if norm == "l2" else root
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


def pool_value(step: Step, inputs: Values, masks: Values) -> np.ndarray:
    (x,) = inputs
    require(x.ndim == 3, f"no independent check of {step.layer}")
    reduce = np.max if step.kind == "max_pooling" else np.mean
    windows = _windows(step, x.shape[1])
    return np.stack([reduce(x[:, window], axis=1) for window in windows], axis=1)


def pool_bounds(step: Step, states: list[Bounds], norm: str, output: Bounds) -> Bounds:
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
