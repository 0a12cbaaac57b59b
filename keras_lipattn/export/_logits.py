"""Getting at the logits of a classifier that ends in a softmax or a sigmoid."""

import dataclasses
from typing import Any

import keras

from keras_lipattn.certification import Certificate
from keras_lipattn.certification.trace import Trace
from keras_lipattn.certification.traced_model import TracedModel

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
    length = certificate.threat_model.max_tokens
    traced = TracedModel(model, (structure,), sequence_length=length)
    calls = traced.trace.calls
    if traced.logit_call is None:
        return Ending(refusal=_misleading(traced.trace, certificate.head))
    last = calls[traced.logit_call]
    if sum(call.operation is last.operation for call in calls) > 1:
        name = last.operation.name
        return Ending(refusal=f"its last layer {name!r} is called more than once")
    if not last.recorded:
        return Ending(
            refusal="its `call` ends in an activation from `keras.ops`, which cannot be left out: "
            "use a layer, such as `keras.layers.Softmax`"
        )
    return Ending(last.operation)


def _misleading(trace: Trace, head: str) -> str:
    """Why the output is no logit although nothing can be left out; empty when it may be one."""
    final = [
        call.operation
        for call in trace.calls
        if [*map(id, call.outputs)] == [*map(id, trace.outputs)]
    ]
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
