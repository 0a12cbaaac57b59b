"""Nodes of `keras.ops` which belong to no other family."""

import math

import numpy as np

from keras_lipattn.bounds import layer_constants
from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.linear_map import matrix_norm
from keras_lipattn.certify.registry import register_operation
from keras_lipattn.certify.rules.activations import convert, slope
from keras_lipattn.certify.rules.linear import NOT_FINITE, einsum_step, matrix_step
from keras_lipattn.certify.rules.merging import product_step
from keras_lipattn.certify.rules.reshaping import tokens_move
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState, product
from keras_lipattn.linalg import SAFETY

_BATCH = "it mixes the examples of a batch"


@register_operation("Negative")
def negative(operation, call):
    return Step(
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
    step = Step(constant=1.0, theorem="largest slope", exact=True, entry_offset=1.0)
    return step


@register_operation("Erf")
def erf(operation, call):
    # 2 / sqrt(pi), rounded up.
    return slope(1.128380, call.state)


@register_operation("Clip")
def clip(operation, call):
    low, high = (_bound(value) for value in (operation.x_min, operation.x_max))
    domain = None
    if low is not None and high is not None and call.state.width is not None:
        # Limits in the wrong order give one of them everywhere; which one depends on the backend.
        domain = Domain.of_entries(min(low, high), max(low, high), call.state.width)
    return Step(constant=1.0, theorem="largest slope", exact=True, domain=domain)


def _bound(value) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@register_operation("Square")
def square(operation, call):
    return product_step([call.state, call.state], call)


@register_operation("ZerosLike", "OnesLike", "FullLike", "EmptyLike")
def filled(operation, call):
    return Step(constant=0.0, theorem="constant", exact=True)


@register_operation("Matmul")
def matmul(operation, call):
    left, right = call.args
    if isinstance(left, TensorState) and not isinstance(right, TensorState):
        kernel = call.constant(right)
        if kernel.ndim == 2:
            return matrix_step(kernel, None, call.norm)
        return Step(constant=math.inf, reason="it multiplies with a batch of matrices")
    if isinstance(right, TensorState) and not isinstance(left, TensorState):
        kernel = call.constant(left)
        if kernel.ndim == 2 and len(right.shape) == 2:
            return _mix_tokens(kernel, call)
    return Step(
        constant=math.inf, reason="it multiplies two tensors of the graph, which is not bounded"
    )


def _mix_tokens(kernel: np.ndarray, call: Call) -> Step:
    """`kernel @ x`, the same mixture of tokens for every channel."""
    if not np.isfinite(kernel).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    if call.norm == "l2":
        constant = matrix_norm(kernel, "l2")
    else:
        constant = SAFETY * float(np.abs(kernel).sum(axis=1).max())
    return Step(
        constant=constant, theorem="norm of the mixing matrix", exact=True, mixes_tokens=True
    )


@register_operation("Einsum")
def einsum(operation, call):
    operands = list(call.args)
    equation = operation.subscripts.replace(" ", "")
    if len(operands) != 2 or "->" not in equation:
        return Step(constant=math.inf, reason=f"the equation {equation!r} is not a linear map")
    if not isinstance(operands[0], TensorState):
        inputs, result = equation.split("->")
        first, second = inputs.split(",")
        operands, equation = operands[::-1], f"{second},{first}->{result}"
    state, kernel = operands
    if not isinstance(state, TensorState) or isinstance(kernel, TensorState):
        return Step(
            constant=math.inf, reason="it multiplies two tensors of the graph, which is not bounded"
        )
    kernel = call.constant(kernel)
    if not np.isfinite(kernel).all():
        return Step(constant=math.inf, reason=NOT_FINITE)
    return einsum_step(equation, kernel, None, call)


@register_operation("GetItem", "Slice")
def get_item(operation, call):
    if type(operation).__name__ == "Slice":
        return Step(constant=1.0, theorem="entries are dropped", exact=True, domain=_around(call))
    key = call.args[1]
    keys = list(key) if isinstance(key, tuple | list) else [key]
    basic = all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in keys)
    if not basic:
        return Step(
            constant=math.inf, reason="it picks entries by an array, perhaps some more than once"
        )
    rank = len(call.state.shape) + 1
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (rank - used)
    else:
        keys += [slice(None)] * (rank - used)
    last = keys[-1]
    if isinstance(last, slice) and last == slice(None):
        return tokens_move(call, "tokens are dropped")
    if isinstance(last, slice):
        return Step(constant=1.0, theorem="entries are dropped", exact=True, domain=_around(call))
    # The last axis goes: entries of different tokens share one.
    merged = call.shape[-1] if call.shape else 1
    if call.norm == "token" and merged is None:
        return Step(constant=math.inf, reason="its number of tokens is not known")
    return Step(
        constant=layer_constants.regroup_constant(call.norm, merged or 1),
        theorem="entries are dropped",
    )


def _around(call: Call) -> Domain:
    return call.state.domain.around_origin()


@register_operation("Split", "Unstack")
def split(operation, call):
    rank = len(call.state.shape) + 1
    axis = operation.axis % rank
    if axis == 0:
        return Step(constant=math.inf, reason=_BATCH)
    if axis == rank - 1 and type(operation).__name__ == "Unstack":
        return Step(constant=math.inf, reason="no rule for unstacking the last axis")
    if axis == rank - 1:
        return Step(constant=1.0, theorem="entries are dropped", exact=True, domain=_around(call))
    return tokens_move(call, "tokens are dropped")


@register_operation("Flip", "Roll")
def flip(operation, call):
    rank = len(call.state.shape) + 1
    axes = operation.axis
    if axes is None:
        return Step(constant=math.inf, reason=_BATCH)
    axes = {a % rank for a in (axes if isinstance(axes, list | tuple) else [axes])}
    if 0 in axes:
        return Step(constant=math.inf, reason=_BATCH)
    if rank - 1 in axes:
        return Step(constant=1.0, theorem="entries move", exact=True, domain=_around(call))
    return tokens_move(call)


@register_operation("Pad")
def pad(operation, call):
    rank = len(call.state.shape) + 1
    widths = list(operation.pad_width)
    if operation.mode != "constant" or (len(widths) == rank and tuple(widths[0]) != (0, 0)):
        return Step(constant=math.inf, reason="it repeats entries, or pads the batch axis")
    if len(call.args) > 1 or call.kwargs.get("constant_values") not in (None, 0, 0.0):
        return Step(constant=1.0, theorem="constants are added", exact=True)
    last = len(widths) == rank and tuple(widths[-1]) == (0, 0)
    return Step(
        constant=1.0,
        theorem="zeros are added",
        exact=True,
        mixes_tokens=last,
        domain=_around(call),
    )


@register_operation("Repeat", "Tile", "BroadcastTo")
def repeat(operation, call):
    old, new = call.state.shape, call.shape
    if _repeats_examples(operation, len(old) + 1):
        return Step(constant=math.inf, reason=_BATCH)
    entries, total = call.state.entries, product(new)
    if not isinstance(getattr(operation, "repeats", 1), int | tuple | list) or None in (
        entries,
        total,
    ):
        return Step(constant=math.inf, reason="how often it repeats an entry is not known")
    if any(call.state.dynamic):
        return Step(constant=math.inf, reason="how often it repeats an entry varies")
    repeats = getattr(operation, "repeats", None)
    if type(operation).__name__ == "Repeat" and not isinstance(repeats, int):
        return Step(constant=math.inf, reason="it repeats some entries more often than others")
    if call.norm == "l2":
        constant = SAFETY * math.sqrt(total / entries)
    elif call.norm == "token" and old and new[-1] != old[-1]:
        constant = SAFETY * math.sqrt(new[-1] / old[-1])
    else:
        constant = 1.0
    return Step(constant=constant, theorem="each entry repeated", exact=True)


def _repeats_examples(operation, rank: int) -> bool:
    """Whether the batch axis changes; `rank` is that of the input with it."""
    kind = type(operation).__name__
    if kind == "Repeat":
        return operation.axis is None or operation.axis % rank == 0
    if kind == "Tile":
        repeats = operation.repeats
        # As many leading ones are put in front as there are axes without a number.
        return np.ndim(repeats) > 0 and len(repeats) >= rank and set(repeats[: 1 - rank]) != {1}
    shape = operation.shape
    return len(shape) != rank or shape[0] not in (None, -1)


@register_operation("Mean", "Sum")
def mean_or_sum(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state, rank = call.state, len(call.state.shape) + 1
    most = product(tuple(state.shape[a - 1] for a in axes))
    fewest = math.prod(1 if state.dynamic[a - 1] else state.shape[a - 1] or 1 for a in axes)
    mean = type(operation).__name__ == "Mean"
    if most is None:
        if not mean:
            return Step(constant=math.inf, reason="how many entries it adds is not known")
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
            return Step(constant=math.inf, reason="the size of its last axis is not known")
        constant = 1.0 / math.sqrt(last) if mean else most / math.sqrt(last)
    else:
        constant = l2 * convert("l2", "token", state)
    if math.isinf(constant):
        return Step(constant=math.inf, reason="its number of tokens is not known")
    return Step(
        constant=SAFETY * constant,
        theorem=theorem,
        exact=rank - 1 not in axes and not any(state.dynamic),
        mixes_tokens=rank - 1 not in axes,
        domain=state.domain if mean and rank - 1 not in axes else None,
    )


@register_operation("Max", "Min", "Amax", "Amin", "Logsumexp")
def extremum(operation, call):
    axes, refusal = _reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state, rank = call.state, len(call.state.shape) + 1
    theorem = "maximum of entries"
    if call.norm != "token":
        return Step(constant=1.0, theorem=theorem, exact=True)
    if rank - 1 not in axes:
        sizes = [product(tuple(state.shape[a - 1] for a in axes)), state.width]
        known = [size for size in sizes if size is not None]
        if not known:
            return Step(constant=math.inf, reason="neither its window nor its channels are known")
        return Step(constant=SAFETY * math.sqrt(min(known)), theorem=theorem)
    if operation.keepdims:
        return Step(constant=1.0, theorem=theorem, exact=True)
    price = convert("l2", "token", state)
    if math.isinf(price):
        return Step(constant=math.inf, reason="its number of tokens is not known")
    return Step(constant=price, theorem="2-norm, converted")


def _reduced_axes(operation, call: Call):
    rank = len(call.state.shape) + 1
    axes = operation.axis
    if axes is None:
        return set(), Step(constant=math.inf, reason=_BATCH)
    axes = {int(a) % rank for a in (axes if isinstance(axes, list | tuple) else [axes])}
    if 0 in axes:
        return set(), Step(constant=math.inf, reason=_BATCH)
    return axes, None
