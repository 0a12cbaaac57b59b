"""Operations that reduce or sort along axes (docs/theory.md, section 8)."""

import math
from typing import Any

from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import (
    LipschitzMap,
    TokenMixing,
    unbounded,
)
from keras_lipattn.certification.reasons import (
    MOVES_BATCH,
    UNKNOWN_TOKENS,
    Cause,
)
from keras_lipattn.certification.registry import register_operation
from keras_lipattn.certification.rules.activations import convert
from keras_lipattn.certification.rules.pooling import entries_range
from keras_lipattn.certification.tensor_state import product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY


@register_operation("Mean", "Sum")
def mean_or_sum(operation, call):
    axes, refusal = reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state, rank = call.state, call.state.rank
    most = product(tuple(state.shape[a - 1] for a in axes))
    fewest = math.prod(1 if state.dynamic[a - 1] else state.shape[a - 1] or 1 for a in axes)
    mean = type(operation).__name__ == "Mean"
    if most is None:
        if not mean:
            return unbounded("the number of entries it adds is not known", cause=Cause.SIZE)
        # A mean does not need the number of entries.
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
    axes, refusal = reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    state = call.state
    (axis,) = axes
    constant, token_range = 1.0, call.state.range.about_origin()
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
        constant=constant, theorem="sorting does not increase differences", range=token_range
    )


@register_operation("TopK")
def top_k(operation, call):
    return unbounded("its indices jump when the input changes", remedy="use `keras.ops.sort`")


@register_operation("Norm")
def vector_norm(operation, call):
    axes, refusal = reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    if operation.ord not in ((None, 2) if len(axes) == 1 else (None, "fro")):
        return unbounded(f"the norm of order {operation.ord!r} has no rule", cause=Cause.NO_RULE)
    return _euclidean(call, axes, operation.keepdims, 1.0, "norm of a vector")


@register_operation("Std", "Var", "Moments")
def deviation(operation, call):
    axes, refusal = reduced_axes(operation, call)
    if refusal is not None:
        return refusal
    if getattr(operation, "synchronized", False):
        return unbounded(
            "it takes moments over the examples of several replicas", cause=Cause.BATCH
        )
    state = call.state
    sizes = [1 if state.dynamic[a - 1] else state.shape[a - 1] or 1 for a in axes]
    # The norm of the deviation from the mean, divided by the root of the number of entries.
    layer_map = _euclidean(
        call, axes, operation.keepdims, 1.0 / math.sqrt(math.prod(sizes)), "standard deviation"
    )
    name = type(operation).__name__
    if name == "Std" or math.isinf(layer_map.constant):
        return layer_map
    largest = state.range.largest
    if not math.isfinite(largest):
        return unbounded(
            "a variance has no constant on inputs that are not bounded", cause=Cause.UNBOUNDED
        )
    # The gradient of a variance is twice that of the standard deviation times its value, which is
    # at most the largest entry. A mean has constant 1.
    slope_there = max(2.0 * largest, 1.0 if name == "Moments" else 0.0)
    width = call.shape[-1] if call.shape else 1
    token_range = None
    if width is not None:
        top = max(largest**2, largest if name == "Moments" else 0.0)
        token_range = TokenRange.of_entries(-top, top, width)
    return LipschitzMap(
        constant=SAFETY * slope_there * layer_map.constant, theorem="variance", range=token_range
    )


def _euclidean(call: LayerCall, axes: set, keepdims: bool, factor: float, theorem: str):
    """The map of `factor` times a Euclidean norm, or a function of constant 1 in it, over axes."""
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
    axes, refusal = reduced_axes(operation, call)
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


def reduced_axes(operation, call: LayerCall):
    rank = call.state.rank
    axes = operation.axes if hasattr(operation, "axes") else operation.axis
    if axes is None:
        return set(), unbounded(MOVES_BATCH)
    axes = {int(a) % rank for a in (axes if isinstance(axes, list | tuple) else [axes])}
    if 0 in axes:
        return set(), unbounded(MOVES_BATCH)
    return axes, None
