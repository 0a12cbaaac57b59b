"""Bounds of the entries of tensors that do not change, such as masks."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.class_code import operation_name
from keras_lipattn.certification.tensor_state import ANYTHING, Interval, TensorState, product

# Operations that only move, repeat, drop or average entries.
_KEEPS = frozenset(
    (
        "Amax Amin BroadcastTo Cast Concatenate ConvertToTensor Copy ExpandDims Flatten Flip "
        "GetItem Identity Max Mean Min Moveaxis Permute Repeat Reshape Roll Slice Split Squeeze "
        "Stack StopGradient Swapaxes Tile Transpose Unstack Where"
    ).split()
)
_LAYERS = frozenset(
    {
        keras.layers.Concatenate,
        keras.layers.Flatten,
        keras.layers.Identity,
        keras.layers.Permute,
        keras.layers.Reshape,
    }
)
_LARGEST_HALF = 65504.0
_WITHIN = {
    "OnesLike": (1.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "ZerosLike": (0.0, 0.0),
}


def interval_of(operand: Any) -> Interval:
    """Lower and upper bound of the entries of a state, a number or an array."""
    if isinstance(operand, TensorState):
        if operand.dtype == "bool":
            return 0.0, 1.0
        if operand.values is None:
            return operand.interval
        operand = operand.values
    if not (keras.ops.is_tensor(operand) or isinstance(operand, np.ndarray | float | int)):
        # A variable is cast before it is used.
        return ANYTHING
    values = np.asarray(keras.ops.convert_to_numpy(operand))
    if values.dtype.kind not in "fiub" or not values.size or not np.isfinite(values).all():
        return ANYTHING
    return float(values.min()), float(values.max())


def interval_after(operation: Any, arguments: Mapping[str, Any], dtype: str) -> Interval:
    """Lower and upper bound of the output of an operation on tensors that do not change.

    Args:
        operation: an operation or a layer.
        arguments: its arguments by name, with a `TensorState` for every tensor.
        dtype: of the output.

    Returns:
        Two numbers; `ANYTHING` if nothing is known.
    """
    if dtype == "bool":
        return 0.0, 1.0
    name = operation_name(operation)
    is_layer = isinstance(operation, keras.layers.Layer)
    if not name or (is_layer and type(operation) not in _LAYERS):
        return ANYTHING
    if "x1" in arguments and "x2" in arguments:
        operands = [arguments["x1"], arguments["x2"]]
    elif name in ("GetItem", "Slice"):
        # Not the indices.
        operands = [next(iter(arguments.values()))]
    else:
        operands = keras.tree.flatten(list(arguments.values()))
    intervals = [interval_of(one) for one in operands if one is not None]
    low, high = _after(name, operation, arguments, intervals)
    if not math.isfinite(high - low):
        return ANYTHING
    if dtype.startswith(("int", "uint")):
        # Casts round to a neighbor, and numbers that are too large wrap around.
        low, high = math.floor(low), math.ceil(high)
        limits = np.iinfo(dtype)
        return (low, high) if limits.min <= low <= high <= limits.max else ANYTHING
    too_large = dtype == "float16" and max(-low, high) > _LARGEST_HALF
    return ANYTHING if too_large else (low, high)


def _after(name: str, operation, arguments, intervals: list[Interval]) -> Interval:
    if name in _WITHIN:
        return _WITHIN[name]
    if not intervals or getattr(operation, "initial", None) is not None:
        return ANYTHING
    if name in _KEEPS:
        return min(low for low, _ in intervals), max(high for _, high in intervals)
    if name in ("Tril", "Triu"):
        return min(intervals[0][0], 0.0), max(intervals[0][1], 0.0)
    if name == "Negative":
        return -intervals[0][1], -intervals[0][0]
    if name in ("Absolute", "Abs"):
        low, high = intervals[0]
        return max(low, -high, 0.0), max(high, -low)
    if name == "Clip":
        return _clipped(operation, intervals[0])
    if name == "Sum":
        return _sum(operation, arguments, intervals[0])
    if len(intervals) != 2:
        return ANYTHING
    (a, b), (c, d) = intervals
    if name == "Maximum":
        return max(a, c), max(b, d)
    if name == "Minimum":
        return min(a, c), min(b, d)
    if name == "Add":
        return a + c, b + d
    if name == "Subtract":
        return a - d, b - c
    if name == "Multiply":
        return _corners(intervals, lambda x, y: x * y)
    if name in ("Divide", "TrueDivide") and (c > 0.0 or d < 0.0):
        return _corners(intervals, lambda x, y: x / y)
    return ANYTHING


def _corners(intervals: list[Interval], function) -> Interval:
    values = [function(x, y) for x, y in itertools.product(*intervals)]
    return (math.nan, math.nan) if any(map(math.isnan, values)) else (min(values), max(values))


def _clipped(operation, interval: Interval) -> Interval:
    least, most = operation.x_min, operation.x_max
    if not all(one is None or isinstance(one, int | float) for one in (least, most)):
        return ANYTHING
    if least is not None and most is not None and least > most:
        # Backends differ.
        return ANYTHING
    low, high = (one if least is None else max(one, least) for one in interval)
    return (low, high) if most is None else (min(low, most), min(high, most))


def _sum(operation, arguments, interval: Interval) -> Interval:
    """The interval of a sum over axes with at least one entry and a known largest size."""
    state = arguments.get("x")
    axes = operation.axis
    if axes is None or not isinstance(state, TensorState) or not state.fold:
        return ANYTHING
    axes = {int(a) % state.rank for a in (axes if isinstance(axes, list | tuple) else [axes])}
    most = product(tuple(state.shape[a - 1] for a in axes))
    if 0 in axes or most is None:
        return ANYTHING
    fewest = product(tuple(1 if state.dynamic[a - 1] else state.shape[a - 1] for a in axes)) or 1
    low, high = interval
    return low * (most if low < 0.0 else fewest), high * (most if high > 0.0 else fewest)
