"""What will be served, and what can be said about it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.certification import Certificate
from keras_lipattn.certification.keras_models import call_specs
from keras_lipattn.certification.weights import cast_to_compute_dtype
from keras_lipattn.export._logits import Ending, ending_of
from keras_lipattn.export._ports import Port

# Certified from the lookup on, as `ThreatModel.inputs` names it.
_LOOKED_UP = "output of "
_CLASSES = {
    "softmax": "the class with the largest logit",
    "logits": "the class with the largest logit",
    "sigmoid": "1 where the logit is positive, that is where the sigmoid is above 1/2, else 0",
    "logit": "1 where the output, taken for a logit, is positive, else 0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which signatures a model gets.

    Args:
        ending: How the model ends; its `refusal` says why there is no signature `certified`.
        unreachable: Whether the certificate speaks of logits that cannot be served.
        certified: The inputs which may be perturbed, as they are sent.
        embedded: The inputs of integers which are looked up.
        largest_embedding: Largest Euclidean norm of a row they are looked up in.
    """

    ending: Ending
    unreachable: bool
    certified: Sequence[Port]
    embedded: Sequence[Port]
    largest_embedding: float

    @property
    def refusal(self) -> str:
        """Why there is no signature `certified`; empty when there is one."""
        return self.ending.refusal

    def words(self, certificate: Certificate) -> dict[str, str]:
        """What the outputs of the signature `certified` mean."""
        if self.refusal:
            return {}
        spaces = [
            *(["inputs"] if self.certified else []),
            *(["embeddings"] if self.embedded else []),
        ]
        space = "the " + " and ".join(spaces)
        return {
            "class": _CLASSES[certificate.head],
            "radius": (
                f"the class is the same for all {space} closer than this in the {certificate.norm} "
                f"norm ({NORMS[certificate.norm]}), in the units of {space}"
            ),
        }


def make_plan(
    model: keras.Model,
    structure: Any,
    ports: Sequence[Port],
    certificate: Certificate,
    outputs: Sequence[np.ndarray],
    sequence_length: int | None,
) -> Plan:
    """Decides which signatures a model gets.

    Args:
        model: The model.
        structure: What it is called on, symbolic tensors.
        ports: Its inputs, flat.
        certificate: Its certificate.
        outputs: What it returns on an example, flat.
        sequence_length: Largest size of the axis of an input that varies, or `None`.
    """
    _, names = call_specs(model, (structure,))
    used = certificate.threat_model.inputs
    certified = [port for port, name in zip(ports, names, strict=True) if name in used]
    embedded = []
    if any(name.startswith(_LOOKED_UP) for name in used):
        embedded = [p for p in ports if p not in certified and not p.floating and p.dtype != "bool"]
    tables = [
        cast_to_compute_dtype(layer.embeddings, None)
        for layer in model._flatten_layers()
        if getattr(layer, "embeddings", None) is not None
    ]
    largest = max((np.linalg.norm(table, axis=-1).max() for table in tables), default=0.0)
    ending = Ending(refusal="nothing finite is certified")
    if certificate.is_finite:
        ending = ending_of(model, structure, certificate)
    unreachable = bool(ending.refusal) and certificate.head in ("softmax", "sigmoid")
    if not ending.refusal and certificate.head == "logits" and _probabilities(outputs[0]):
        unreachable = True
        ending = Ending(
            refusal="its outputs are probabilities, made by something else than the last "
            "activation: end in a layer such as `keras.layers.Softmax`, or without a softmax"
        )
    if not ending.refusal:
        ending = Ending(ending.operation, _unbounded_length(ports, certificate, sequence_length))
    if not ending.refusal and embedded:
        if not tables:
            ending = Ending(
                refusal="the size of what its integer inputs are looked up in is unknown"
            )
        elif np.isfinite(certificate.threat_model.input_radius):
            ending = Ending(refusal="`input_radius` cannot be checked where integers are looked up")
    return Plan(
        ending=ending,
        unreachable=unreachable,
        certified=certified,
        embedded=embedded,
        largest_embedding=float(largest),
    )


def _unbounded_length(
    ports: Sequence[Port], certificate: Certificate, sequence_length: int | None
) -> str:
    """Why it cannot be seen from a request whether it is short enough; empty when it can."""
    longest = certificate.threat_model.max_tokens
    varying = max((len(port.dynamic_axes) for port in ports), default=0)
    if longest is None or varying == 0 or (varying == 1 and sequence_length is not None):
        return ""
    return (
        f"it is certified for at most {longest} tokens, which cannot be told from the size of its "
        "inputs: let one axis vary, and give `sequence_length`"
    )


def _probabilities(output: np.ndarray) -> bool:
    output = output.astype(np.float64)
    return bool((output >= 0.0).all() and (np.abs(output.sum(axis=-1) - 1.0) < 1e-3).all())
