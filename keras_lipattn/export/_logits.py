"""Getting at the logits of a classifier that ends in a softmax or a sigmoid."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from keras_lipattn.certify import Certificate, graph
from keras_lipattn.certify.gain import Gain
from keras_lipattn.certify.margins import find_head
from keras_lipattn.certify.tensor_state import TensorState

_LINEAR = (None, keras.activations.linear)


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a model ends.

    Args:
        operation: The layer or operation whose activation is to be left out, or `None`.
        refusal: Why the model cannot be served as a classifier, in words; empty when it can.
    """

    operation: Any = None
    refusal: str = ""


def ending_of(model: keras.Model, structure: Any, certificate: Certificate) -> Ending:
    """Looks for the activation that a certificate leaves out, and for what else is in the way.

    Args:
        model: The model.
        structure: What it is called on, symbolic tensors.
        certificate: Its certificate.
    """
    if not certificate.head:
        return Ending(refusal="its output is not one vector of numbers per example")
    function = graph.function_of(model)
    traced = function is None
    if function is None:
        states = keras.tree.map_structure(_state, structure)
        with graph.names_kept():
            function, _ = graph.trace(model, (states,), {}, mask_of=lambda state: state)
    _, dropped = find_head(function)
    calls = list(_calls(function))
    last = [node.operation for node in calls if id(node) in dropped]
    if not last:
        return Ending(refusal=_misleading(calls, function, certificate.head))
    if len(last) > 1 or sum(node.operation is last[0] for node in calls) > 1:
        return Ending(refusal=f"its last layer {last[0].name!r} is called more than once")
    if traced and not isinstance(last[0], keras.layers.Layer):
        return Ending(
            refusal="its `call` ends in an activation from `keras.ops`, which cannot be left out: "
            "use a layer, such as `keras.layers.Softmax`"
        )
    return Ending(last[0])


def _state(leaf: keras.KerasTensor) -> TensorState:
    """A symbolic tensor as `graph.trace` takes it; what is known of its size does not matter."""
    sizes = tuple(leaf.shape[1:])
    nothing = Gain.none("l2")
    return TensorState(
        gain=nothing,
        published=nothing,
        shape=sizes,
        dynamic=tuple(size is None for size in sizes),
        dtype=keras.backend.standardize_dtype(leaf.dtype),
    )


def _calls(function: Any) -> Iterator[Any]:
    """All calls of a graph, those in nested models once for every call of the model."""
    for node in graph.nodes_in_order(function):
        yield node
        inner = None
        if isinstance(node.operation, keras.Model):
            inner = graph.function_of(node.operation)
        if inner is not None:
            yield from _calls(inner)


def _misleading(calls: list[Any], function: Any, head: str) -> str:
    """Why the output is no logit although nothing can be left out; empty when it may be one."""
    outputs = [leaf for leaf in keras.tree.flatten(function.outputs)]
    final = [node.operation for node in calls if node.outputs and node.outputs[0] is outputs[0]]
    activation = getattr(final[-1], "activation", None) if final else None
    if head == "logit" and activation not in _LINEAR:
        return (
            f"its one unit ends in {_name(activation)}, for which the value that separates the "
            "classes is not known: end in a sigmoid or without an activation"
        )
    if head == "logits" and activation is keras.activations.sigmoid:
        return "it has several sigmoid units: a label of its own for each, not one class"
    return ""


def _name(activation: Any) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


@contextlib.contextmanager
def without_activation(operation: Any) -> Iterator[None]:
    """Lets a layer or operation return what goes into its activation.

    Not for threads: the layer itself is changed for the time being.

    Args:
        operation: As found by `ending_of`; `None` changes nothing.
    """
    if operation is None:
        yield
        return
    # Past `__setattr__`, which would track the function as part of the layer.
    attributes = vars(operation)
    if "activation" in attributes:
        kept = attributes["activation"]
        attributes["activation"] = keras.activations.linear
        try:
            yield
        finally:
            attributes["activation"] = kept
    else:
        attributes["call"] = _first_argument
        try:
            yield
        finally:
            del attributes["call"]


def _first_argument(inputs, *args, **kwargs):
    return inputs
