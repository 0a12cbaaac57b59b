"""Layers with several inputs: sums, concatenations, maxima (docs/theory.md, section 8)."""

import math

import keras
import numpy as np

from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.gain import Gain
from keras_lipattn.certify.registry import register_operation, register_rule
from keras_lipattn.certify.rules.linear import NOT_FINITE, scaling_step
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState, product
from keras_lipattn.linalg import SAFETY


def operands_of(inputs, call: Call) -> list[TensorState]:
    """The inputs of a merging layer, with constants of the graph as states that do not move."""
    return [
        value if isinstance(value, TensorState) else _constant_state(value, call)
        for value in keras.tree.flatten(inputs)
    ]


def weighted_sum(operands: list[TensorState], coefficients, call: Call, theorem: str) -> Step:
    """The step of `sum_i coefficients[i] * operand i`, with the broadcasting of numpy."""
    varying = [state for state in operands if not state.held]
    sizes = [float(np.max(np.abs(c))) for c in coefficients]
    moving = [size for size, state in zip(sizes, operands, strict=True) if not state.held]
    gains = [
        0.0 if state.held else size * _broadcast(state, call)
        for size, state in zip(sizes, operands, strict=True)
    ]
    if not np.isfinite(gains).all():
        return Step(constant=math.inf, reason="it repeats an input along an axis of unknown size")
    if any(state.shape != call.shape for state in varying):
        joint = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
        return Step(
            constant=SAFETY * joint, gains=tuple(gains), operands=tuple(operands), theorem=theorem
        )
    joint = math.hypot(*moving) if call.norm == "l2" else math.fsum(moving)
    return Step(
        constant=joint,
        theorem=theorem,
        exact=True,
        operands=tuple(operands),
        coefficients=tuple(coefficients),
    )


@register_rule(keras.layers.Add)
def add(layer, call):
    operands = operands_of(call.first, call)
    return weighted_sum(operands, [1.0] * len(operands), call, "sum of branches")


@register_rule(keras.layers.Subtract)
def subtract(layer, call):
    operands = operands_of(call.first, call)
    return weighted_sum(operands, [1.0, -1.0], call, "sum of branches")


@register_rule(keras.layers.Average)
def average(layer, call):
    operands = operands_of(call.first, call)
    return weighted_sum(operands, [1.0 / len(operands)] * len(operands), call, "mean of branches")


@register_operation("Add")
def add_operation(operation, call):
    return weighted_sum(operands_of(call.args, call), [1.0, 1.0], call, "sum of branches")


@register_operation("Subtract")
def subtract_operation(operation, call):
    return weighted_sum(operands_of(call.args, call), [1.0, -1.0], call, "sum of branches")


@register_rule(keras.layers.Multiply)
def multiply(layer, call):
    return product_step(operands_of(call.first, call), call)


@register_operation("Multiply")
def multiply_operation(operation, call):
    return product_step(operands_of(call.args, call), call)


def product_step(operands: list[TensorState], call: Call) -> Step:
    """The step of a product of tensors, entry by entry.

    `|d(x y)| <= max|y| |dx| + max|x| |dy|`: a constant only where the factors are bounded.
    """
    varying = [state for state in operands if not state.held]
    fixed = [state for state in operands if state.held]
    values = [state.values for state in fixed if state.values is not None]
    if len(varying) == 1 and len(values) == len(fixed):
        scale = np.ones(())
        for value in values:
            scale = scale * value
        return _scaled(scale, varying[0], call)
    # Under a mask the layer puts 1 in place of what is masked.
    largest = [
        max(state.domain.largest, 1.0) if state.masked else state.domain.largest
        for state in operands
    ]
    gains = []
    for index, state in enumerate(operands):
        others = math.prod(size for i, size in enumerate(largest) if i != index)
        gains.append(0.0 if state.held else others * _broadcast(state, call))
    if not np.isfinite(gains).all():
        return Step(
            constant=math.inf,
            reason="it multiplies tensors that are not bounded; a saturating activation, a "
            "normalisation or `input_radius` bounds them",
        )
    joint = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
    size = math.prod(largest)
    domain = None
    if call.shape and call.shape[-1] is not None and math.isfinite(size):
        domain = Domain.of_entries(-size, size, call.shape[-1])
    return Step(
        constant=SAFETY * joint,
        theorem="product rule on bounded factors",
        operands=tuple(operands),
        gains=tuple(SAFETY * gain for gain in gains),
        domain=domain,
    )


def _scaled(scale: np.ndarray, state: TensorState, call: Call) -> Step:
    if not np.isfinite(scale).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    if state.shape == call.shape:
        return scaling_step(scale, call, theorem="largest factor")
    repeats = _broadcast(state, call)
    if math.isinf(repeats):
        return Step(constant=math.inf, reason="it repeats its input along an axis of unknown size")
    return Step(
        constant=SAFETY * float(np.abs(scale).max(initial=0.0)) * repeats,
        theorem="largest factor, repeated",
    )


@register_operation("Divide", "TrueDivide")
def divide(operation, call):
    left, right = operands_of(call.args, call)
    if right.held and right.values is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _scaled(1.0 / right.values, left, call)
    return Step(constant=math.inf, reason="it divides by a tensor which may come close to 0")


@register_rule(keras.layers.Maximum, keras.layers.Minimum)
def maximum(layer, call):
    return _selection(operands_of(call.first, call), call, "maximum of entries")


@register_operation("Maximum", "Minimum", "Fmax", "Fmin")
def maximum_operation(operation, call):
    return _selection(operands_of(call.args, call), call, "maximum of entries")


@register_operation("Where")
def where(operation, call):
    condition, *branches = [*call.args, *call.kwargs.values()]
    if isinstance(condition, TensorState) and not condition.held:
        return Step(
            constant=math.inf,
            reason="its condition moves with the input, and the output jumps with it",
        )
    if len(branches) != 2:
        return Step(constant=math.inf, reason="it has no branches to choose from")
    return _selection(operands_of(branches, call), call, "choice of entries")


def _selection(operands: list[TensorState], call: Call, theorem: str) -> Step:
    """Every entry of the output moves at most as much as one of the entries it is chosen from."""
    varying = [state for state in operands if not state.held]
    repeats = [_broadcast(state, call) for state in varying]
    if not np.isfinite(repeats).all():
        return Step(constant=math.inf, reason="it repeats an input along an axis of unknown size")
    radius = math.inf
    if all(state.domain.bounded for state in operands):
        radius = math.hypot(*(state.domain.outer_radius for state in operands))
    largest = max(state.domain.largest for state in operands)
    return Step(
        constant=max(repeats),
        theorem=theorem,
        exact=set(repeats) == {1.0},
        operands=tuple(operands),
        entrywise=True,
        domain=Domain(radius, None, largest),
    )


@register_rule(keras.layers.Concatenate)
def concatenate(layer, call):
    return concatenation(operands_of(call.first, call), layer.axis, call)


@register_operation("Concatenate")
def concatenate_operation(operation, call):
    return concatenation(operands_of(call.args, call), operation.axis, call)


@register_operation("Stack")
def stack(operation, call):
    rank = len(call.shape) + 1
    if operation.axis % rank == 0:
        return Step(constant=math.inf, reason="it adds an axis before the batch axis")
    return concatenation(operands_of(call.args, call), operation.axis, call, new_axis=True)


def concatenation(
    operands: list[TensorState], axis: int, call: Call, *, new_axis: bool = False
) -> Step:
    """The step of tensors side by side: 1 in every norm for the tensors taken together.

    With a new last axis a token of the output holds one entry of each tensor.
    """
    rank = len(call.shape) + 1
    if axis % rank == 0:
        return Step(constant=math.inf, reason="it joins tensors along the batch axis")
    last = axis % rank == rank - 1
    domain = None
    if all(state.domain.bounded for state in operands):
        radii = [state.domain.outer_radius for state in operands]
        largest = max(state.domain.largest for state in operands)
        domain = Domain(SAFETY * math.hypot(*radii) if last else max(radii), None, largest)
    varying = [state for state in operands if not state.held]
    root = varying[0].root
    # Only along an old axis are the linear maps of one tensor those of the features side by side.
    joined = last and not new_axis and len(varying) == len(operands)
    if joined and all(state.root is root for state in operands):
        widths = [state.width for state in operands]
        if None not in widths:
            return Step(
                constant=1.0,
                theorem="side by side",
                exact=True,
                operands=tuple(operands),
                entrywise=True,
                concatenates=True,
                domain=domain,
            )
    return Step(
        constant=1.0,
        theorem="side by side",
        exact=True,
        operands=tuple(operands),
        entrywise=last,
        domain=domain,
    )


@register_rule(keras.layers.Dot)
def dot(layer, call):
    return Step(
        constant=math.inf, reason="it multiplies two tensors of the graph, which is not bounded"
    )


def _constant_state(value, call: Call) -> TensorState:
    values = call.constant(value)
    nothing = Gain.none(call.norm)
    width = call.shape[-1] if call.shape else None
    spread = values
    if width is not None and (values.ndim == 0 or values.shape[-1] == 1):
        # A number for all entries of a token: its domain is that of the tokens it makes.
        spread = np.broadcast_to(values, (*values.shape[:-1], width))
    return TensorState(
        gain=nothing,
        published=nothing,
        shape=values.shape,
        dynamic=(False,) * values.ndim,
        held=True,
        values=values,
        domain=Domain.of_values(spread),
    )


def _broadcast(state: TensorState, call: Call) -> float:
    """How much a change of `state` can grow when it is repeated to the shape of the output."""
    if state.shape == call.shape or call.norm == "linf":
        return 1.0
    if call.norm == "token":
        width, last = state.width, call.shape[-1] if call.shape else 1
        if width is None or last is None:
            return math.inf
        return math.sqrt(last) if width == 1 < last else 1.0
    entries, total = state.entries, product(call.shape)
    if entries is None or total is None:
        return math.inf
    if not any(state.dynamic):
        return math.sqrt(total / entries)
    # Only axes of size 1 are repeated; those that vary are the same in all inputs.
    short = (1,) * (len(call.shape) - len(state.shape)) + state.shape
    repeated = tuple(new if old == 1 else 1 for old, new in zip(short, call.shape, strict=True))
    return math.sqrt(product(repeated) or math.inf)
