"""The calls of the layers of a model, for decisions that need to know what a layer is called on."""

import functools
from collections.abc import Sequence
from typing import Any

from keras import KerasTensor, layers
from keras.src import backend
from keras.src.ops.numpy import Add, GetItem, Reshape

from keras_lipattn.certification.trace import Trace, TracedCall


class Calls:
    """What the layers and recorded operations of a model are called on, at inference.

    Args:
        trace: A trace of the model.

    Attributes:
        last: The `id`s of the layers and operations that return outputs of the model.
        exchanged: The `id`s of the operations that will be replaced.
        without_activation: Maps the `id`s of the layers and operations whose softmax or sigmoid
            will be left out to its name.
    """

    def __init__(self, trace: Trace):
        self._trace = trace
        self.exchanged: set[int] = set()
        self.without_activation: dict[int, str] = {}
        self._of: dict[int, list[TracedCall]] = {}
        self._producer: dict[int, TracedCall] = {}
        for call in trace.calls:
            self._of.setdefault(id(call.operation), []).append(call)
            for tensor in call.outputs:
                self._producer[id(tensor)] = call
        self.last = {id(call.operation) for call in self.ends()}

    def of(self, operation: Any) -> list[TracedCall]:
        """The calls of a layer, or of an operation of a graph."""
        return self._of.get(id(operation), [])

    def ends(self) -> list[TracedCall]:
        """The calls that return outputs of the model, before a reshape that keeps the classes."""
        passed = {id(call.outputs[0]): call.tensors[0] for call in self._last_reshapes}
        outputs = map(self._trace.resolve, self._trace.outputs)
        producers = [self._producer_of(passed.get(id(one), one)) for one in outputs]
        return [call for call in producers if call is not None]

    def only_ends(self, operation: Any) -> bool:
        """Whether all that a layer or operation returns are outputs, used by nothing else."""
        ends = [id(call) for call in self.ends()]
        used = self._used(but=self._last_reshapes)
        return all(
            id(call) in ends and not used.intersection(map(id, call.outputs))
            for call in self.of(operation)
        )

    @functools.cached_property
    def _last_reshapes(self) -> list[TracedCall]:
        """Reshapes at the end that keep the last axis, such as that of `TimeDistributed`."""
        used = self._used()
        calls = [self._producer_of(tensor) for tensor in self._trace.outputs]
        return [
            call
            for call in calls
            if call is not None
            and type(call.operation) is Reshape
            and call.tensors[0].shape[-1] == call.outputs[0].shape[-1]
            and id(call.outputs[0]) not in used
        ]

    def _used(self, but: Sequence[TracedCall] = ()) -> set[int]:
        """The `id`s of the tensors that calls use."""
        calls = [call for call in self._trace.calls if not any(call is one for one in but)]
        tensors = [tensor for call in calls for tensor in (*call.tensors, *call.keras_masks)]
        return {id(self._trace.resolve(tensor)) for tensor in tensors}

    def input_shape(self, layer: Any) -> tuple[int | None, ...] | None:
        """Shape that all inputs of a layer have, `None` for sizes that differ or vary.

        Returns:
            `None` if the layer is not called, or if its inputs have different numbers of axes.
        """
        shapes = []
        for call in self.of(layer):
            (tensor, *_) = call.tensors
            shape: Any = self._trace.flexible.get(id(self._trace.resolve(tensor)), tensor.shape)
            # An axis that varies in code that runs for one size only may be called a number.
            shapes.append(tuple(shape) if not self._trace.exact_length else _ends(tensor.shape))
        if not shapes or len({len(shape) for shape in shapes}) > 1:
            return None
        merged = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]
        return (None, *merged[1:])

    def is_cross_attention(self, call: TracedCall) -> bool:
        """Whether the value or key of a call of attention is another tensor than the query."""
        given = [call.arguments.get(name) for name in ("query", "value", "key")]
        tensors = [self._trace.resolve(one) for one in given if isinstance(one, KerasTensor)]
        return any(one is not tensors[0] for one in tensors)

    def terms(self, call: TracedCall) -> list[KerasTensor] | None:
        """The tensors that a call adds; `None` unless all have one shape and change with inputs."""
        tensors = [self._trace.resolve(one) for one in call.tensors]
        operands = len(tensors)
        if not isinstance(call.operation, layers.Layer):
            # A number or an array is an operand too.
            operands = 2
        if len(tensors) != operands or len(tensors) < 2:
            return None
        if len({len(one.shape) for one in tensors}) > 1:
            return None
        # An axis of unknown size matches every size.
        if any(
            len({*sides} - {None}) > 1
            for sides in zip(*(one.shape for one in tensors), strict=True)
        ):
            return None
        if not all(self._changes(one) for one in tensors):
            return None
        return tensors

    def skip(self, one: KerasTensor, other: KerasTensor) -> int | None:
        """Index of the tensor that the other one is computed from."""
        if id(one) in self._ancestors(other):
            return 0
        return 1 if id(other) in self._ancestors(one) else None

    def loses_mask(self, operation: Any) -> bool:
        """Whether a mask is attached to a tensor that an operation of a graph is called on.

        Keras passes masks on from layer to layer, not through operations.
        """
        return any(
            backend.get_keras_mask(tensor) is not None
            for call in self.of(operation)
            for tensor in call.tensors
        )

    def picked_tokens(self) -> set[int]:
        """Numbers of tokens of which an operation such as `x[:, 0]` keeps one."""
        shapes = [
            (call.tensors[0].shape, call.outputs[0].shape)
            for call in self._trace.calls
            if isinstance(call.operation, GetItem)
        ]
        return {
            before[1]
            for before, after in shapes
            if len(before) == 3 and len(after) == 2 and before[::2] == after and before[1] != 1
        }

    def terms_before(self, layer: Any) -> int:
        """How many tensors are added in the code of a layer just before each call of `layer`."""
        counts = {self._added(call.tensors[0]) for call in self.of(layer)}
        return counts.pop() if len(counts) == 1 else 1

    def _added(self, tensor: KerasTensor) -> int:
        call = self._producer_of(tensor)
        if call is None or not _adds(call.operation) or id(call.operation) in self.exchanged:
            return 1
        terms = self.terms(call)
        if terms is None:
            return 1
        return sum(self._added(term) for term in terms)

    def _producer_of(self, tensor: KerasTensor) -> TracedCall | None:
        return self._producer.get(id(self._trace.resolve(tensor)))

    @functools.cached_property
    def _inputs(self) -> set[int]:
        """Inputs that are certified, or looked up in a table that is."""
        return {id(tensor) for tensor in self._trace.inputs if tensor.dtype != "bool"}

    def _changes(self, tensor: KerasTensor) -> bool:
        return bool(self._inputs & self._ancestors(tensor))

    def _ancestors(self, tensor: KerasTensor) -> set[int]:
        """The `id`s of the tensors that a tensor is computed from, itself among them."""
        found: set[int] = set()
        stack = [self._trace.resolve(tensor)]
        while stack:
            one = stack.pop()
            if id(one) in found:
                continue
            found.add(id(one))
            call = self._producer.get(id(one))
            if call is not None:
                stack += map(self._trace.resolve, call.tensors)
        return found


def _adds(operation: Any) -> bool:
    return type(operation) is Add


def _ends(shape: Any) -> tuple[int | None, ...]:
    return (None,) * (len(shape) - 1) + (shape[-1],)
