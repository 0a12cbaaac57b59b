"""A model traced on batches of two sizes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import KerasTensor

from keras_lipattn._seen_calls import remembered_call
from keras_lipattn.certification.batch_axis import BatchComparison
from keras_lipattn.certification.classifier_head import find_head
from keras_lipattn.certification.keras_models import call_specs, function_of, names_kept
from keras_lipattn.certification.reasons import DEPENDS_ON_BATCH, UNKNOWN_ACTIVATION, Reason
from keras_lipattn.certification.registry import find_rule
from keras_lipattn.certification.rules.activations import name_of
from keras_lipattn.certification.trace import Trace, TraceError
from keras_lipattn.certification.tracing import trace

Shape = tuple[int | None, ...]

# A graph that depends on the size of the batch differs between these two: primes, which are rarely
# the size of anything else.
BATCH_SIZES = (5, 7)

# Layers whose code consists of a few operations: with a custom activation, their code is traced.
_SPELLED_OUT = (keras.layers.Activation, keras.layers.Dense)


class TracedModel:
    """The trace of a model, and the kind of its output.

    Args:
        model: a built model.
        inputs: for models without a graph, the inputs of a call, see `certify`.
        sequence_length: size of an axis of unknown size, where an input has one.
        shapes: sizes of the inputs without the first axis, in place of `sequence_length`.

    Attributes:
        names: names of the inputs, in flat order.
        failure: why the model cannot be traced; `None` when it can.
        trace: the trace that is certified.
        comparison: comparison of that trace with one on another number of examples.
        head: kind of classifier, see `find_head`.
        call_options: arguments of the call other than the inputs.
        logit_call: index of the call whose activation is left out, or `None`.
    """

    def __init__(
        self,
        model: keras.Model,
        inputs: Any = None,
        sequence_length: int | None = None,
        shapes: Sequence[Shape] | None = None,
    ):
        self.model = model
        arguments, self.names = call_specs(model, inputs)
        self.failure: Reason | None = None
        self.head, self.logit_call = "", None
        # As `predict` calls it.
        self.call_options = {"training": False} if model._call_has_training_arg else {}
        fixed = [leaf.shape[0] for leaf in keras.tree.flatten(arguments) if leaf.shape[0]]
        sizes = (fixed[0], fixed[0]) if fixed else BATCH_SIZES
        self._arguments, self._flexible = _sized(model, arguments, sequence_length, shapes)
        try:
            self.trace = self._first_trace(sizes[0])
            if inputs is None and _guesses_dtypes(model) and self._look_up_integers():
                self.trace = self._trace(sizes[0])
        except TraceError as error:
            self.failure = dataclasses.replace(
                error.reason,
                text=f"it cannot be traced on a batch of {sizes[0]} examples: {error}",
            )
            self.trace = self._empty(sizes[0])
            self.comparison = BatchComparison(self.trace, self.trace)
            return
        other = self.trace
        if not fixed:
            try:
                other = self._trace(sizes[1])
            except TraceError:
                self.failure = DEPENDS_ON_BATCH
        self.comparison = BatchComparison(self.trace, other)
        if self.comparison.differ:
            self.failure = DEPENDS_ON_BATCH
        self.head, self.logit_call = find_head(self.trace)

    @property
    def arguments(self) -> tuple:
        """The inputs of the call, with a `KerasTensor` for every tensor."""
        return self._arguments

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Sizes of the inputs without the first axis."""
        return tuple(tuple(leaf.shape[1:]) for leaf in keras.tree.flatten(self._arguments))

    @property
    def only_for_its_shapes(self) -> bool:
        """Whether inputs of other sizes may run other code."""
        return self.trace.exact_length or function_of(self.model) is None

    @functools.cached_property
    def single(self) -> Trace:
        """The trace on one example, which values are computed on."""
        batch = self.trace.batch if self.trace.batch not in BATCH_SIZES else 1
        single = self._trace(batch)
        if BatchComparison(single, self.trace).differ:
            raise TraceError(DEPENDS_ON_BATCH)
        return single

    def _look_up_integers(self) -> bool:
        """Makes inputs of embeddings integers; returns whether there are any.

        Keras does not store the dtypes of the inputs of a model without a graph.
        """
        looked_up = {
            id(tensor)
            for call in self.trace.calls
            if isinstance(call.operation, keras.layers.Embedding)
            for tensor in call.tensors
        }
        looked_up |= {id(self.trace.aliases.get(key)) for key in looked_up}
        leaves = [
            KerasTensor(leaf.shape, dtype="int32") if id(tensor) in looked_up else leaf
            for leaf, tensor in zip(
                keras.tree.flatten(self._arguments), self.trace.inputs, strict=True
            )
        ]
        self._arguments = keras.tree.pack_sequence_as(self._arguments, leaves)
        return any(id(tensor) in looked_up for tensor in self.trace.inputs)

    def _first_trace(self, batch: int) -> Trace:
        try:
            return self._trace(batch)
        except TraceError:
            if not self.call_options:
                raise
        # A graph that passes `training` by position takes no other value for it.
        self.call_options = {}
        return self._trace(batch)

    def _trace(self, batch: int) -> Trace:
        with names_kept():
            return trace(
                self.model,
                self._arguments,
                batch=batch,
                refusal_of=_refusal_of,
                flexible=self._flexible,
                **self.call_options,
            )

    def _empty(self, batch: int) -> Trace:
        leaves = keras.tree.flatten(self._arguments)
        inputs = [KerasTensor((batch, *leaf.shape[1:]), dtype=leaf.dtype) for leaf in leaves]
        return Trace(batch=batch, inputs=inputs)


def _guesses_dtypes(model: keras.Model) -> bool:
    return function_of(model) is None and remembered_call(model) is None


def _refusal_of(layer: keras.layers.Layer) -> str:
    activation = getattr(layer, "activation", None)
    if type(layer) in _SPELLED_OUT and not (
        activation is None or isinstance(activation, keras.layers.Layer) or name_of(activation)
    ):
        return UNKNOWN_ACTIVATION.text
    return find_rule(layer)[1]


def _sized(model, arguments, sequence_length, shapes) -> tuple[Any, list[Shape]]:
    """The inputs at the sizes of the trace, and their shapes with `None` for sizes that vary."""
    leaves = keras.tree.flatten(arguments)
    has_graph = function_of(model) is not None
    sized, flexible = [], []
    for index, leaf in enumerate(leaves):
        sizes = tuple(leaf.shape[1:])
        integers = not keras.backend.is_float_dtype(keras.backend.standardize_dtype(leaf.dtype))
        if shapes is not None:
            sizes = open_sizes = tuple(shapes[index])
        else:
            if (
                not has_graph
                and sequence_length is not None
                and None not in sizes
                and len(sizes) > (0 if integers else 1)
            ):
                # The model also takes lengths other than that of its first call.
                sizes = (None, *sizes[1:])
            open_sizes = sizes
            if sizes.count(None) == 1 and sequence_length is not None:
                sizes = tuple(sequence_length if size is None else size for size in sizes)
        sized.append(KerasTensor((leaf.shape[0], *sizes), dtype=leaf.dtype))
        flexible.append(open_sizes)
    return keras.tree.pack_sequence_as(arguments, sized), flexible
