"""Comparison of two traces on batches of different size, to find what depends on the batch."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import KerasTensor

from keras_lipattn.certification.class_code import operation_name
from keras_lipattn.certification.reasons import DEPENDS_ON_BATCH, MOVES_BATCH, Reason
from keras_lipattn.certification.trace import Trace, TracedCall

# Attributes that hold a shape, whose first entry may be a multiple of the batch size.
_TARGET_SHAPES = {"Reshape": "newshape", "BroadcastTo": "shape"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape of a tensor for any number of examples.

    Args:
        shape: sizes of the axes after the first one; of all axes if `fold` is 0.
        dynamic: for each of these axes, whether its size varies from call to call.
        fold: entries of the first axis per example, 0 for a tensor without a batch axis.
        dtype: a string.
    """

    shape: tuple[int | None, ...]
    dynamic: tuple[bool, ...]
    fold: int
    dtype: str

    def fields(self) -> dict[str, Any]:
        """The fields of a `TensorState`."""
        return dict(shape=self.shape, dynamic=self.dynamic, fold=self.fold, dtype=self.dtype)


class BatchComparison:
    """Comparison of two traces of one model on batches of different size.

    Args:
        first: the trace that is certified.
        second: the other trace; the same one where the batch size of the model is fixed.
    """

    def __init__(self, first: Trace, second: Trace):
        self._first, self._second = first, second
        # A tensor has no layout if its shape is not a multiple of the batch size in the first axis.
        self.layouts: dict[int, Layout] = {}
        self.refusals: dict[int, Reason] = {}
        self.differ = len(first.calls) != len(second.calls)
        if self.differ:
            return
        for one, other in zip(
            [*first.inputs, *first.outputs], [*second.inputs, *second.outputs], strict=True
        ):
            self._compare_tensors(one, other)
        for index, (one, other) in enumerate(zip(first.calls, second.calls, strict=True)):
            refusal = self._compare_calls(one, other)
            if refusal:
                self.refusals[index] = refusal

    def _compare_calls(self, one: TracedCall, other: TracedCall) -> Reason | None:
        for tensors in zip(
            [*one.tensors, *one.outputs], [*other.tensors, *other.outputs], strict=False
        ):
            self._compare_tensors(*tensors)
        if not _same_operation(one.operation, other.operation):
            return DEPENDS_ON_BATCH
        args, other_args = ((call.args, call.kwargs) for call in (one, other))
        try:
            keras.tree.assert_same_structure(args, other_args)
            args = keras.tree.map_structure(_same_argument, args, other_args)
        except (_Differs, ValueError, TypeError):
            return DEPENDS_ON_BATCH
        one.args, one.kwargs = args
        if any(id(tensor) not in self.layouts for tensor in one.outputs):
            return MOVES_BATCH
        return None

    def _compare_tensors(self, one: KerasTensor, other: KerasTensor) -> None:
        if id(one) in self.layouts:
            return
        for trace, tensor in ((self._first, one), (self._second, other)):
            if id(tensor) in trace.constants:
                try:
                    value = _same_argument(
                        self._first.constants[id(one)], self._second.constants[id(other)]
                    )
                except (_Differs, KeyError):
                    return
                self._first.constants[id(one)] = value
                self.layouts[id(one)] = Layout(
                    tuple(value.shape), (False,) * value.ndim, 0, _dtype(one)
                )
                return
        shape, fold = _fold(one.shape, other.shape, self._first.batch, self._second.batch)
        if shape is None:
            return
        flexible = self._first.flexible.get(id(one), tuple(one.shape))
        dynamic = tuple(size is None for size in flexible[1 if fold else 0 :])
        if self._first.exact_length:
            dynamic = (False,) * len(dynamic)
        self.layouts[id(one)] = Layout(shape, dynamic, fold, _dtype(one))


class _Differs(Exception):
    """An argument is not the same for both batches."""


def _fold(one, other, batch: int, other_batch: int):
    """Sizes after the first axis and entries per example; `(None, 0)` for any other shape."""
    if len(one) == len(other) and one and one[0] is not None and other[0] is not None:
        counts = one[0] / batch, other[0] / other_batch
        if counts[0] == counts[1] == int(counts[0]) > 0 and tuple(one[1:]) == tuple(other[1:]):
            return tuple(one[1:]), int(counts[0])
    if tuple(one) == tuple(other) and batch != other_batch:
        return tuple(one), 0
    return None, 0


def _same_operation(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, keras.layers.Layer) or type(one) is not type(other):
        return False
    target = _TARGET_SHAPES.get(operation_name(one))
    mine, theirs = vars(one), vars(other)
    for name in mine.keys() | theirs.keys():
        # Attributes that begin with "_" are bookkeeping of Keras.
        if name == "name" or name.startswith("_"):
            continue
        values = mine.get(name), theirs.get(name)
        if name == target and all(isinstance(value, tuple | list) for value in values):
            values = tuple(tuple(value)[1:] for value in values)
        try:
            keras.tree.assert_same_structure(*values)
            keras.tree.map_structure(_same_argument, *values)
        except (_Differs, ValueError, TypeError):
            return False
    return True


def _same_argument(one: Any, other: Any) -> Any:
    """An argument that is the same in both runs; of an array that repeats itself, one example."""
    if isinstance(one, KerasTensor) or isinstance(other, KerasTensor):
        if type(one) is not type(other):
            raise _Differs
        return one
    if one is other:
        return one
    if keras.ops.is_tensor(one) or isinstance(one, np.ndarray):
        if not (keras.ops.is_tensor(other) or isinstance(other, np.ndarray)):
            raise _Differs
        return _same_array(one, other)
    if type(one) is not type(other) or not _equal(one, other):
        raise _Differs
    return one


def _same_array(one: Any, other: Any) -> np.ndarray:
    left, right = (np.asarray(keras.ops.convert_to_numpy(array)) for array in (one, other))
    if left.shape == right.shape and _equal(left, right):
        return left
    if left.ndim == right.ndim > 0 and left.shape[1:] == right.shape[1:]:
        row = left[:1]
        if len(left) and all(
            _equal(part, np.broadcast_to(row, part.shape)) for part in (left, right)
        ):
            return row
    raise _Differs


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(np.array_equal(one, other, equal_nan=True))
    except TypeError:
        return bool(np.all(one == other))


def _dtype(tensor: KerasTensor) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)
