"""Sums, products, maxima and concatenations (docs/theory.md, section 8)."""

import dataclasses
import math

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.fixed_entries import interval_of
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import (
    Combination,
    Concatenation,
    Elementwise,
    LipschitzMap,
    unbounded,
)
from keras_lipattn.certification.reasons import (
    CONDITION_JUMPS,
    NOT_FINITE,
    REPEATS,
    Cause,
    Reason,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.linear import scaling_map
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY


def operands_of(call: LayerCall, *names: str) -> list[TensorState]:
    """The states of the tensors and constants in some arguments."""
    values = [call.argument(name) for name in names]
    return [call.operand(leaf) for leaf in keras.tree.flatten(values)]


def weighted_sum(
    operands: list[TensorState], coefficients, call: LayerCall, theorem: str
) -> LipschitzMap:
    """The map of `sum_i coefficients[i] * operand i`, with broadcasting as in NumPy."""
    perturbed = [state for state in operands if not state.is_fixed]
    sizes = [float(np.max(np.abs(c))) for c in coefficients]
    gains = [
        0.0 if state.is_fixed else size * _broadcast(state, call)
        for size, state in zip(sizes, operands, strict=True)
    ]
    if not np.isfinite(gains).all():
        return unbounded(REPEATS)
    joint = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
    if any(state.shape != call.shape for state in perturbed):
        return LipschitzMap(
            constant=SAFETY * joint,
            per_input=tuple(gains),
            operands=tuple(operands),
            theorem=theorem,
            range=_sum_range(operands, sizes, call),
        )
    return Combination(
        constant=joint,
        theorem=theorem,
        exact=True,
        operands=tuple(operands),
        coefficients=tuple(coefficients),
    )


_ADDS_ELSEWHERE = Reason(
    "TensorFlow adds one of its tensors along another axis where the batch has a single example",
    remedy="use `keras.ops.subtract(x, -y)`, or repeat the tensor along that axis before",
    cause=Cause.BATCH,
)


def _added(
    operands: list[TensorState], call: LayerCall, theorem: str, coefficient: float = 1.0
) -> LipschitzMap:
    """The map of a sum by `keras.ops.add`, times a number."""
    if _adds_elsewhere(operands):
        return unbounded(_ADDS_ELSEWHERE)
    return weighted_sum(operands, [coefficient] * len(operands), call, theorem)


def _adds_elsewhere(operands: list[TensorState]) -> bool:
    """Whether Keras takes a later tensor for a bias if the batch has a single example.

    On TensorFlow, `keras.ops.add(x, y)` adds a `y` with one axis longer than 1 along the last axis
    of `x`, or else along the axis after the batch, wherever the size fits.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    shapes = [(state.fold, *state.shape) if state.fold else state.shape for state in operands]
    total = shapes[0]
    for state, own in zip(operands[1:], shapes[1:], strict=True):
        long = [axis - len(own) for axis, size in enumerate(own) if size != 1]
        if state.fold and len(long) == 1 and len(total) > 1 and not any(state.dynamic):
            ends = (total[-1], -1), (total[1], 1 - len(total))
            taken = [place for size, place in ends if size == own[long[0]]]
            if taken and taken[0] != long[0]:
                return True
        width = max(len(total), len(own))
        padded = [(1,) * (width - len(one)) + tuple(one) for one in (total, own)]
        total = tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))
    return False


def _sum_range(operands, sizes, call: LayerCall) -> TokenRange | None:
    """The range of a sum with broadcasting."""
    width = call.shape[-1] if call.shape and not call.dynamic[-1] else None
    if width is None:
        return None
    total = TokenRange(0.0)
    for state, size in zip(operands, sizes, strict=True):
        before = TokenRange(_spread_radius(state, call), None, _largest(state))
        total = total.plus(before.scaled(size))
    return total


@register_rule(keras.layers.Add)
def add(layer, call):
    return _added(operands_of(call, "inputs"), call, "sum of branches")


@register_rule(keras.layers.Subtract)
def subtract(layer, call):
    return weighted_sum(operands_of(call, "inputs"), [1.0, -1.0], call, "sum of branches")


@register_rule(keras.layers.Average)
def average(layer, call):
    operands = operands_of(call, "inputs")
    return _added(operands, call, "mean of branches", 1.0 / len(operands))


@register_operation("Add")
def add_operation(operation, call):
    return _added(operands_of(call, "x1", "x2"), call, "sum of branches")


@register_operation("Subtract")
def subtract_operation(operation, call):
    return weighted_sum(operands_of(call, "x1", "x2"), [1.0, -1.0], call, "sum of branches")


@register_rule(keras.layers.Multiply)
def multiply(layer, call):
    return product_map(operands_of(call, "inputs"), call)


@register_operation("Multiply")
def multiply_operation(operation, call):
    return product_map(operands_of(call, "x1", "x2"), call)


def product_map(operands: list[TensorState], call: LayerCall) -> LipschitzMap:
    """The map of a product of tensors, entry by entry.

    `|d(x y)| <= max|y| |dx| + max|x| |dy|`: a constant exists only where the factors are bounded.
    """
    perturbed = [state for state in operands if not state.is_fixed]
    fixed = [state for state in operands if state.is_fixed]
    values = [state.values for state in fixed if state.values is not None]
    if len(perturbed) == 1 and len(values) == len(fixed) and not call.keras_masks:
        scale = np.ones(())
        for value in values:
            scale = scale * value
        return _scaled(scale, perturbed[0], call)
    if len(operands) == 2 and not call.keras_masks:
        first, second = operands
        known = _self_gated(first, second, call) or _self_gated(second, first, call)
        if known is not None:
            return known
    # With a mask, the layer replaces masked entries by 1.
    least = 1.0 if call.keras_masks else 0.0
    largest = [max(_largest(state), least) for state in operands]
    gains = []
    for index, state in enumerate(operands):
        others = math.prod(size for i, size in enumerate(largest) if i != index)
        gains.append(0.0 if state.is_fixed else others * _broadcast(state, call))
    if not np.isfinite(gains).all():
        return unbounded(_NOT_BOUNDED)
    joint = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
    size = math.prod(largest)
    token_range = None
    if call.shape and call.shape[-1] is not None and math.isfinite(size):
        token_range = TokenRange.of_entries(-size, size, call.shape[-1])
        for index, state in enumerate(operands):
            others = math.prod(value for i, value in enumerate(largest) if i != index)
            radius = SAFETY * others * _spread_radius(state, call)
            token_range = token_range.smaller(TokenRange(radius, None, size))
    return LipschitzMap(
        constant=SAFETY * joint,
        theorem="product rule on bounded factors",
        operands=tuple(operands),
        per_input=tuple(SAFETY * gain for gain in gains),
        range=token_range,
    )


_NOT_BOUNDED = Reason(
    "it multiplies tensors that are not bounded",
    remedy="bound them by a saturating activation, a normalization or `input_radius`, and multiply "
    "by a mask as in `x * keras.ops.cast(mask, x.dtype)[..., None]` with a boolean mask",
    cause=Cause.UNBOUNDED,
)

# The activation `x f(x)` for each gate `f`.
_SELF_GATED = {"sigmoid": "silu", "hard_sigmoid": "hard_silu", "tanh": "mish"}


def _self_gated(x: TensorState, gate: TensorState, call: LayerCall) -> LipschitzMap | None:
    """The map of `x sigmoid(b x)` and similar products, `None` for other gates."""
    if gate.function_of is None or gate.function_of[0] not in _SELF_GATED:
        return None
    name, inner, _ = gate.function_of
    # The derivative of `x s(b x)` at x is that of `x s(x)` at `b x`.
    wanted = "softplus" if name == "tanh" else "scaled"
    if inner.function_of is not None and inner.function_of[0] == wanted:
        inner = inner.function_of[1]
    elif name == "tanh":
        return None
    if inner is not x or x.shape != call.shape:
        return None
    constant = layer_constants.activation_constant(_SELF_GATED[name], call.norm)
    return Elementwise(
        constant=constant,
        theorem="largest slope",
        exact=True,
        operands=(x,),
        value_at_zero=0.0,
    )


def _scaled(scale: np.ndarray, state: TensorState, call: LayerCall) -> LipschitzMap:
    if not np.isfinite(scale).all():
        return unbounded(NOT_FINITE)
    if state.shape == call.shape and state.fold == call.fold:
        layer_map = scaling_map(scale, call, theorem="largest factor")
        return dataclasses.replace(layer_map, function_of=("scaled", state, layer_map.constant))
    repeats = _broadcast(state, call)
    if math.isinf(repeats):
        return unbounded(REPEATS)
    largest = SAFETY * float(np.abs(scale).max(initial=0.0))
    token_range = TokenRange.up_to(largest * state.range.largest, call.width)
    longest = _longest_factors(scale, state, call)
    if longest is not None:
        return LipschitzMap(
            constant=longest, theorem="longest vector of factors", exact=True, range=token_range
        )
    return LipschitzMap(
        constant=largest * repeats, theorem="largest factor, repeated", range=token_range
    )


def _longest_factors(scale: np.ndarray, state: TensorState, call: LayerCall) -> float | None:
    """Largest norm of the factors that one entry of a repeated operand is multiplied by.

    An entry `x` becomes `(s_1 x, s_2 x, ...)`, and no two entries share a place in the output. In
    the norms of tokens only factors of the same token count together. `None` where sizes vary, or
    factors differ between the examples of a batch.
    """
    rank = len(call.shape) + bool(call.fold)
    sizes = [size for size in call.shape if size is not None]
    if any(call.dynamic) or len(sizes) < len(call.shape) or scale.ndim > rank:
        return None
    scale = scale.reshape((1,) * (rank - scale.ndim) + scale.shape)
    if call.fold:
        if len(scale) != 1:
            return None
        scale = scale[0]
    factors = np.broadcast_to(np.abs(scale), sizes)
    repeated = [
        axis
        for axis, (old, new) in enumerate(zip(state.shape, sizes, strict=True))
        if old == 1 and new != 1
    ]
    if call.norm == "linf":
        repeated = []
    elif call.norm == "token":
        repeated = [axis for axis in repeated if axis == len(call.shape) - 1]
    lengths = np.sqrt(np.square(factors).sum(axis=tuple(repeated)))
    return SAFETY * float(lengths.max(initial=0.0))


_MAY_BE_ZERO = Reason(
    "it divides by a tensor that may come close to 0",
    remedy="use `GlobalAveragePooling1D()(x, mask=mask)` with a boolean mask for a mean over valid "
    "tokens, and `x / keras.ops.maximum(y, 1.0)` for other fixed divisors",
)


@register_operation("Divide", "TrueDivide")
def divide(operation, call):
    left, right = operands_of(call, "x1", "x2")
    if right.is_fixed and right.values is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _scaled(1.0 / right.values, left, call)
    low, high = interval_of(right)
    least = max(low, -high)
    if right.is_fixed and least > 0.0 and left.shape == call.shape:
        token_range = left.range.about_origin().scaled(SAFETY / least)
        return LipschitzMap(
            constant=SAFETY / least,
            theorem="division by a tensor bounded away from 0",
            operands=(left,),
            range=token_range,
        )
    return unbounded(_MAY_BE_ZERO)


@register_rule(keras.layers.Maximum, keras.layers.Minimum)
def maximum(layer, call):
    return _selection(operands_of(call, "inputs"), call, "maximum of entries")


@register_operation("Maximum", "Minimum", "Fmax", "Fmin")
def maximum_operation(operation, call):
    return _selection(operands_of(call, "x1", "x2"), call, "maximum of entries")


@register_operation("Where")
def where(operation, call):
    condition = call.argument("condition")
    joined = _joined_at_zero(condition, call)
    if joined is not None:
        return joined
    if isinstance(condition, TensorState) and not condition.is_fixed:
        return unbounded(CONDITION_JUMPS)
    branches = [call.argument("x1"), call.argument("x2")]
    if any(branch is None for branch in branches):
        return unbounded("it returns indices instead of choosing between two tensors")
    return _selection(operands_of(call, "x1", "x2"), call, "choice of entries")


def _joined_at_zero(condition, call: LayerCall) -> LipschitzMap | None:
    """The map of `where(x > 0, a x, b x)`, which is continuous, `None` for anything else."""
    if not isinstance(condition, TensorState) or condition.function_of is None:
        return None
    name, x, _ = condition.function_of
    if name != "sign" or x.shape != call.shape:
        return None
    slopes = []
    for branch in operands_of(call, "x1", "x2"):
        known = branch.function_of
        if branch is x:
            slopes.append(1.0)
        elif known is not None and known[0] == "scaled" and known[1] is x:
            slopes.append(known[2])
        elif branch.values is not None and not branch.values.any():
            slopes.append(0.0)
        else:
            return None
    return Elementwise(
        constant=max(slopes),
        theorem="largest slope",
        exact=True,
        operands=(x,),
        value_at_zero=0.0,
    )


def _selection(operands: list[TensorState], call: LayerCall, theorem: str) -> LipschitzMap:
    """The map of a choice between tensors, entry by entry."""
    perturbed = [state for state in operands if not state.is_fixed]
    repeats = [_broadcast(state, call) for state in perturbed]
    if not np.isfinite(repeats).all():
        return unbounded(REPEATS)
    radius = math.hypot(*(_spread_radius(state, call) for state in operands))
    largest = max(state.range.largest for state in operands)
    return LipschitzMap(
        constant=max(repeats),
        theorem=theorem,
        exact=set(repeats) == {1.0},
        operands=tuple(operands),
        entrywise=True,
        range=TokenRange(radius, None, largest),
    )


@register_rule(keras.layers.Concatenate)
def concatenate(layer, call):
    return concatenation(operands_of(call, "inputs"), layer.axis, call)


@register_operation("Concatenate")
def concatenate_operation(operation, call):
    return concatenation(operands_of(call, "xs"), operation.axis, call)


@register_operation("Stack")
def stack(operation, call):
    return concatenation(operands_of(call, "x"), operation.axis, call, new_axis=True)


def concatenation(
    operands: list[TensorState], axis: int, call: LayerCall, *, new_axis: bool = False
) -> LipschitzMap:
    """The map of a concatenation: its constant is 1 in every norm for all tensors together."""
    rank = call.rank
    if axis is None or axis % rank == 0:
        return unbounded("it joins tensors along the batch axis", cause=Cause.BATCH)
    last = axis % rank == rank - 1
    token_range = None
    if all(state.range.bounded for state in operands):
        largest = max(state.range.largest for state in operands)
        if last and new_axis:
            # A token consists of one entry of each tensor.
            radius = math.hypot(*(state.range.largest for state in operands))
        else:
            radii = [state.range.outer_radius for state in operands]
            radius = math.hypot(*radii) if last else max(radii)
        token_range = TokenRange(SAFETY * radius, None, largest)
    perturbed = [state for state in operands if not state.is_fixed]
    root = perturbed[0].root
    one_root = len(perturbed) == len(operands) and all(state.root is root for state in operands)
    known = all(state.width is not None for state in operands)
    merges = last and one_root and known and not new_axis
    return (Concatenation if merges else LipschitzMap)(
        constant=1.0,
        theorem="concatenation",
        exact=True,
        operands=tuple(operands),
        entrywise=last,
        range=token_range,
    )


def _spread_radius(state: TensorState, call: LayerCall) -> float:
    """Radius of a ball around the origin for the tokens of an operand after broadcasting."""
    width = call.shape[-1] if call.shape else None
    if state.width == width:
        return state.range.outer_radius
    return math.inf if width is None else SAFETY * math.sqrt(width) * _largest(state)


def _largest(state: TensorState) -> float:
    return 1.0 if state.dtype == "bool" else state.range.largest


def _broadcast(state: TensorState, call: LayerCall) -> float:
    """Constant of the broadcasting of `state` to the shape of the output."""
    if state.fold != call.fold or len(state.shape) != len(call.shape):
        return math.inf
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
    # Only axes of size 1 are repeated; axes of varying size are the same in all inputs.
    repeated = tuple(
        new if old == 1 else 1 for old, new in zip(state.shape, call.shape, strict=True)
    )
    return math.sqrt(product(repeated) or math.inf)
