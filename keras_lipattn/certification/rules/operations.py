"""Nodes of `keras.ops` which belong to no other family."""

import math
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.linear_map import matrix_norm
from keras_lipattn.certification.maps import (
    Combination,
    Elementwise,
    LipschitzMap,
    TokenMixing,
    unbounded,
)
from keras_lipattn.certification.reasons import (
    MOVES_BATCH,
    NOT_FINITE,
    UNKNOWN_TOKENS,
    Cause,
)
from keras_lipattn.certification.registry import register_operation
from keras_lipattn.certification.rules.activations import convert, slope
from keras_lipattn.certification.rules.linear import einsum_step, matrix_step, spell_out
from keras_lipattn.certification.rules.linear_operations import copies
from keras_lipattn.certification.rules.merging import product_step
from keras_lipattn.certification.rules.pooling import entries_range
from keras_lipattn.certification.rules.products import einsum_product, matrix_product
from keras_lipattn.certification.rules.reshaping import tokens_move
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY


@register_operation("Negative")
def negative(operation, call):
    return Combination(
        constant=1.0,
        theorem="identity up to sign",
        exact=True,
        operands=(call.state,),
        coefficients=(-1.0,),
    )


@register_operation("Absolute", "Abs", "Fabs", "Sin", "Arctan", "Arcsinh")
def slope_one(operation, call):
    return slope(1.0, call.state)


@register_operation("Cos")
def cosine(operation, call):
    return Elementwise(constant=1.0, theorem="largest slope", exact=True, value_at_zero=1.0)


@register_operation("Erf")
def erf(operation, call):
    # 2 / sqrt(pi), rounded up.
    return slope(1.128380, call.state)


@register_operation("Clip")
def clip(operation, call):
    low, high = (_bound(value) for value in (operation.x_min, operation.x_max))
    token_range = None
    if low is not None and high is not None and call.state.width is not None:
        # With `x_min` above `x_max` every entry is one of the two.
        token_range = TokenRange.of_entries(min(low, high), max(low, high), call.state.width)
    return LipschitzMap(constant=1.0, theorem="largest slope", exact=True, range=token_range)


def _bound(value) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@register_operation("Square")
def square(operation, call):
    return product_step([call.state, call.state], call)


@register_operation("FullLike")
def filled(operation, call):
    # With a constant value it is fixed and never comes here.
    return unbounded("it fills a tensor with values that change with the input")


@register_operation("Matmul")
def matmul(operation, call):
    left, right = call.operand(call.argument("x1")), call.operand(call.argument("x2"))
    if right.values is not None:
        if right.values.ndim == 2 and left.rank >= 2:
            return matrix_step(right.values, None, call.norm)
        return unbounded("it multiplies by an array of matrices, not by one matrix")
    if left.values is not None and left.values.ndim == 2 and right.rank == 3:
        return _mix_tokens(left.values, call)
    return matrix_product([left, right], call)


def _mix_tokens(kernel: np.ndarray, call: LayerCall) -> LipschitzMap:
    """`kernel @ x`, the same mixture of tokens for every channel."""
    if not np.isfinite(kernel).all():
        return unbounded(NOT_FINITE)
    rows = SAFETY * float(np.abs(kernel).sum(axis=1).max(initial=0.0))
    constant = matrix_norm(kernel, "l2") if call.norm == "l2" else rows
    return TokenMixing(
        constant=constant,
        theorem="norm of the mixing matrix",
        exact=True,
        range=call.state.range.about_origin().scaled(rows),
    )


@register_operation("Dot", "Tensordot")
def dot_operation(operation, call):
    left, right = call.operand(call.argument("x1")), call.operand(call.argument("x2"))
    axes = getattr(operation, "axes", 1)
    pairs = [np.ravel(a).tolist() for a in axes] if isinstance(axes, list | tuple) else []
    plain = axes == 1 or pairs in ([[-1], [0]], [[left.rank - 1], [0]])
    if right.values is None or right.values.ndim != 2 or left.rank < 2 or not plain:
        return unbounded(
            "only the product of the last axis with a constant matrix has a rule",
            cause=Cause.NO_RULE,
        )
    return matrix_step(right.values, None, call.norm)


@register_operation("Einsum")
def einsum(operation, call):
    operands = [call.operand(leaf) for leaf in keras.tree.flatten(call.argument("operands"))]
    equation = operation.subscripts.replace(" ", "")
    if len(operands) == 1 and "->" in equation:
        return _rearranged(equation, call)
    if len(operands) != 2 or "->" not in equation:
        return unbounded(f"the equation {equation!r} is not a linear map")
    if operands[0].values is not None:
        inputs, result = equation.split("->")
        first, second = inputs.split(",")
        operands, equation = operands[::-1], f"{second},{first}->{result}"
    kernel = operands[1].values
    if kernel is None:
        return einsum_product(equation, operands, call)
    if not np.isfinite(kernel).all():
        return unbounded(NOT_FINITE)
    return einsum_step(equation, kernel, None, call)


def _rearranged(equation: str, call: LayerCall) -> LipschitzMap:
    """An equation of one tensor: sums over some axes, and a permutation of the others."""
    state = call.state
    before, _, after = equation.partition("->")
    inputs, result = spell_out(before, after, state.rank)
    if len(set(inputs)) < len(inputs) or len(set(result)) < len(result):
        return unbounded(f"the equation {equation!r} takes a diagonal")
    if inputs[0] != result[:1]:
        return unbounded(MOVES_BATCH)
    sizes = dict(zip(inputs[1:], state.shape, strict=True))
    summed = product(tuple(size for letter, size in sizes.items() if letter not in result))
    if summed is None:
        return unbounded("the number of entries it adds is not known", cause=Cause.SIZE)
    constants = {"l2": SAFETY * math.sqrt(summed), "linf": float(summed)}
    if inputs[-1] == result[-1]:
        constants["token"] = float(summed)
    else:
        constants["token"] = SAFETY * constants["l2"] * convert("l2", "token", state)
    if math.isinf(constants[call.norm]):
        return unbounded(UNKNOWN_TOKENS)
    token_range = entries_range(call, summed)
    if inputs[-1] == result[-1]:
        token_range = state.range.about_origin().scaled(SAFETY * summed)
    return LipschitzMap(constant=constants[call.norm], theorem="sum of entries", range=token_range)


@register_operation("Slice")
def slice_operation(operation, call):
    start_indices = call.argument("start_indices")
    if any(isinstance(leaf, TensorState) for leaf in keras.tree.flatten(start_indices)):
        return unbounded("its start indices are not constants of the model")
    if int(np.ravel(call.constant(start_indices))[0]) != 0:
        return unbounded(MOVES_BATCH)
    return LipschitzMap(
        constant=1.0, theorem="entries are dropped", exact=True, range=_about_origin(call)
    )


@register_operation("GetItem")
def get_item(operation, call):
    key = call.argument("key")
    keys = list(key) if isinstance(key, tuple | list) else [key]
    basic = all(
        k is None or k is Ellipsis or (isinstance(k, int | slice) and not isinstance(k, bool))
        for k in keys
    )
    if not basic:
        return _picked(operation, call)
    rank = call.state.rank
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (rank - used)
    else:
        keys += [slice(None)] * (rank - used)
    if keys[0] != slice(None):
        return unbounded(MOVES_BATCH)
    last = keys[-1]
    if isinstance(last, slice) and last == slice(None) and len(keys) > 1:
        return tokens_move(call, "tokens are dropped")
    if isinstance(last, slice):
        return LipschitzMap(
            constant=1.0, theorem="entries are dropped", exact=True, range=_about_origin(call)
        )
    # The last axis goes: entries of different tokens share one.
    merged = call.shape[-1] if call.shape else 1
    if call.norm == "token" and merged is None:
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(
        constant=layer_constants.regroup_constant(call.norm, merged or 1),
        theorem="entries are dropped",
        range=entries_range(call),
    )


def _picked(operation, call: LayerCall) -> LipschitzMap:
    """Entries picked by arrays."""
    key = call.argument("key")
    if any(isinstance(leaf, TensorState) for leaf in keras.tree.flatten(key)):
        return unbounded("its indices are not constants of the model")
    return copies(call, lambda x: operation.call(x, key), "entries by constant indices")


def _about_origin(call: LayerCall) -> TokenRange:
    return call.state.range.about_origin()


@register_operation("Split", "ArraySplit", "Hsplit", "Vsplit", "Dsplit", "Unstack")
def split(operation, call):
    name = type(operation).__name__
    rank = call.state.rank
    given = {"Hsplit": 1, "Vsplit": 0, "Dsplit": 2}
    axis = (given[name] if name in given else operation.axis) % rank
    if axis == 0:
        return unbounded(MOVES_BATCH)
    if axis == rank - 1 and name == "Unstack":
        # Entries of different tokens share one.
        merged = call.shape[-1] if call.shape else 1
        if call.norm == "token" and merged is None:
            return unbounded(UNKNOWN_TOKENS)
        return LipschitzMap(
            constant=layer_constants.regroup_constant(call.norm, merged or 1),
            theorem="entries are dropped",
            range=entries_range(call),
        )
    if axis == rank - 1:
        return LipschitzMap(
            constant=1.0, theorem="entries are dropped", exact=True, range=_about_origin(call)
        )
    return tokens_move(call, "tokens are dropped")


@register_operation("Flip", "Roll")
def flip(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    if call.state.rank - 1 in axes:
        return LipschitzMap(
            constant=1.0, theorem="entries move", exact=True, range=_about_origin(call)
        )
    return tokens_move(call)


@register_operation("Pad")
def pad(operation, call):
    rank = call.state.rank
    widths = [tuple(np.broadcast_to(width, 2)) for width in operation.pad_width]
    if len(widths) == 1:
        widths = widths * rank
    if len(widths) != rank or widths[0] != (0, 0):
        return unbounded("it pads the batch axis", cause=Cause.BATCH)
    if operation.mode != "constant":
        return copies(call, operation.call, "each entry repeated")
    value = call.argument("constant_values")
    if isinstance(value, TensorState):
        return unbounded("it pads with a value that is not a constant of the model")
    if value not in (None, 0, 0.0):
        largest = max(abs(float(value)), call.state.range.largest)
        return LipschitzMap(
            constant=1.0,
            theorem="constants are added",
            exact=True,
            range=TokenRange.up_to(largest, call.width),
        )
    return (TokenMixing if widths[-1] == (0, 0) else LipschitzMap)(
        constant=1.0, theorem="zeros are added", exact=True, range=_about_origin(call)
    )


@register_operation("Repeat", "Tile", "BroadcastTo")
def repeat(operation, call):
    name = type(operation).__name__
    state = call.state
    if name == "Repeat" and not isinstance(operation.repeats, int):
        return unbounded("it repeats some entries more often than others")
    if name == "Tile":
        repeats = np.ravel(operation.repeats)
        if len(repeats) > state.rank or (len(repeats) == state.rank and repeats[0] != 1):
            return unbounded(MOVES_BATCH)
    if name == "BroadcastTo" and (state.fold != call.fold or state.rank != call.rank):
        return unbounded(MOVES_BATCH)
    if state.entries is None or None in call.shape or any(state.dynamic) or any(call.dynamic):
        return unbounded("the number of times it repeats an entry is not known", cause=Cause.SIZE)
    times = call.fold * product(call.shape) / (state.fold * state.entries)
    old, new = (shape[-1] if shape else 1 for shape in (state.shape, call.shape))
    constant = 1.0
    if call.norm == "l2":
        constant = SAFETY * math.sqrt(times)
    elif call.norm == "token" and new > old:
        constant = SAFETY * math.sqrt(new / old)
    return LipschitzMap(
        constant=constant, theorem="each entry repeated", exact=True, range=entries_range(call)
    )


@register_operation("Mean", "Sum")
def mean_or_sum(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state, rank = call.state, call.state.rank
    most = product(tuple(state.shape[a - 1] for a in axes))
    fewest = math.prod(1 if state.dynamic[a - 1] else state.shape[a - 1] or 1 for a in axes)
    mean = type(operation).__name__ == "Mean"
    if most is None:
        if not mean:
            return unbounded("the number of entries it adds is not known", cause=Cause.SIZE)
        # Not needed for a mean.
        most = 1
    l2 = 1.0 / math.sqrt(fewest) if mean else math.sqrt(most)
    theorem = "mean of entries" if mean else "sum of entries"
    if call.norm == "l2":
        constant = l2
    elif call.norm == "linf":
        constant = 1.0 if mean else float(most)
    elif rank - 1 not in axes:
        constant = 1.0 if mean else float(most)
    elif operation.keepdims:
        last = state.shape[-1]
        if last is None or state.dynamic[-1]:
            return unbounded("the size of its last axis is not known", cause=Cause.SIZE)
        constant = 1.0 / math.sqrt(last) if mean else most / math.sqrt(last)
    else:
        constant = l2 * convert("l2", "token", state)
    if math.isinf(constant):
        return unbounded(UNKNOWN_TOKENS)
    exact = rank - 1 not in axes and not any(state.dynamic)
    constant *= SAFETY
    if rank - 1 in axes:
        return LipschitzMap(
            constant=constant,
            theorem=theorem,
            exact=exact,
            range=TokenRange.up_to(state.range.largest * (1 if mean else most), call.width),
        )
    token_range = state.range if mean else state.range.about_origin().scaled(SAFETY * most)
    return TokenMixing(constant=constant, theorem=theorem, exact=exact, range=token_range)


@register_operation("Sort")
def sort(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state = call.state
    (axis,) = axes
    constant, token_range = 1.0, _about_origin(call)
    if axis != state.rank - 1:
        token_range = entries_range(call)
        sizes = [size for size in (state.shape[axis - 1], state.width) if size is not None]
        if call.norm == "token":
            if not sizes:
                return unbounded(
                    "neither the size of its axis nor its number of channels is known",
                    cause=Cause.SIZE,
                )
            constant = SAFETY * math.sqrt(min(sizes))
    return LipschitzMap(
        constant=constant, theorem="sorting moves no entry further", range=token_range
    )


@register_operation("TopK")
def top_k(operation, call):
    return unbounded("its indices jump when the input changes", remedy="use `keras.ops.sort`")


@register_operation("Norm")
def vector_norm(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    if operation.ord not in ((None, 2) if len(axes) == 1 else (None, "fro")):
        return unbounded(f"the norm of order {operation.ord!r} has no rule", cause=Cause.NO_RULE)
    return _euclidean(call, axes, operation.keepdims, 1.0, "norm of a vector")


@register_operation("Std", "Var", "Moments")
def deviation(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    if getattr(operation, "synchronized", False):
        return unbounded(
            "it takes moments over the examples of several replicas", cause=Cause.BATCH
        )
    state = call.state
    sizes = [1 if state.dynamic[a - 1] else state.shape[a - 1] or 1 for a in axes]
    # The deviation from the mean, over the root of the number of entries.
    step = _euclidean(
        call, axes, operation.keepdims, 1.0 / math.sqrt(math.prod(sizes)), "standard deviation"
    )
    name = type(operation).__name__
    if name == "Std" or math.isinf(step.constant):
        return step
    largest = state.range.largest
    if not math.isfinite(largest):
        return unbounded(
            "a variance has no constant on inputs that are not bounded", cause=Cause.UNBOUNDED
        )
    # Its gradient is twice the deviation, which is at most the largest entry; a mean has slope 1.
    slope_there = max(2.0 * largest, 1.0 if name == "Moments" else 0.0)
    width = call.shape[-1] if call.shape else 1
    token_range = None
    if width is not None:
        top = max(largest**2, largest if name == "Moments" else 0.0)
        token_range = TokenRange.of_entries(-top, top, width)
    return LipschitzMap(
        constant=SAFETY * slope_there * step.constant, theorem="variance", range=token_range
    )


def _euclidean(call: LayerCall, axes: set, keepdims: bool, factor: float, theorem: str):
    """`factor` times a function of slope 1 in the Euclidean norm of the entries of some axes."""
    state = call.state
    last = state.rank - 1
    size = product(tuple(state.shape[a - 1] for a in axes))
    if size is None:
        return unbounded("the number of entries it adds is not known", cause=Cause.SIZE)
    tokens = product(tuple(state.shape[a - 1] for a in axes if a != last)) or 1
    if call.norm == "token" and last in axes and not keepdims:
        constant = convert("l2", "token", state)
        if math.isinf(constant):
            return unbounded(UNKNOWN_TOKENS)
    else:
        constant = {"l2": 1.0, "token": math.sqrt(tokens), "linf": math.sqrt(size)}[call.norm]
    token_range = None
    width = call.shape[-1] if call.shape else 1
    if state.range.bounded and width is not None:
        largest = factor * math.sqrt(size) * state.range.largest
        if last in axes:
            largest = min(largest, factor * math.sqrt(tokens) * state.range.outer_radius)
        token_range = TokenRange.of_entries(0.0, SAFETY * largest, width)
    return LipschitzMap(constant=SAFETY * factor * constant, theorem=theorem, range=token_range)


@register_operation("Max", "Min", "Amax", "Amin", "Logsumexp")
def extremum(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state, rank = call.state, call.state.rank
    theorem = "maximum of entries"
    if type(operation).__name__ == "Logsumexp":
        theorem = "gradient of norm 1"
        count = product(tuple(state.shape[a - 1] for a in axes))
        token_range = None
        if count is not None:
            largest = state.range.largest + math.log(max(count, 1))
            token_range = TokenRange.up_to(largest, call.width)
    elif getattr(operation, "initial", None) is not None:
        token_range = None
    else:
        token_range = entries_range(call)
    fields: dict[str, Any] = dict(theorem=theorem, range=token_range)
    if call.norm != "token":
        return LipschitzMap(constant=1.0, exact=True, **fields)
    if rank - 1 not in axes:
        sizes = [product(tuple(state.shape[a - 1] for a in axes)), state.width]
        known = [size for size in sizes if size is not None]
        if not known:
            return unbounded(
                "neither its window nor its number of channels is known", cause=Cause.SIZE
            )
        return LipschitzMap(constant=SAFETY * math.sqrt(min(known)), **fields)
    if operation.keepdims:
        return LipschitzMap(constant=1.0, exact=True, **fields)
    price = convert("l2", "token", state)
    if math.isinf(price):
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(constant=price, **fields)


def _reduced_axes(operation, call: LayerCall):
    rank = call.state.rank
    axes = operation.axes if hasattr(operation, "axes") else operation.axis
    if axes is None:
        return set(), unbounded(MOVES_BATCH)
    axes = {int(a) % rank for a in (axes if isinstance(axes, list | tuple) else [axes])}
    if 0 in axes:
        return set(), unbounded(MOVES_BATCH)
    return axes, None
