"""Whether what is served is what the Keras model computes."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification import Certificate
from keras_lipattn.certification.classifier_head import without_activation
from keras_lipattn.export import _clean_process
from keras_lipattn.export._allowance import UNIT_ROUNDOFF
from keras_lipattn.export._plan import Plan
from keras_lipattn.export._ports import Port, output_names
from keras_lipattn.export._tracing import call_model
from keras_lipattn.export.export_error import ExportError

_TOLERANCE = 1e-5
# In half precision two orders of the same sums differ by a few units of the last place.
_HALF_PRECISION_UNITS = 16


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How an exported model was compared.

    Args:
        examples: Number of examples.
        tolerance: Largest difference allowed, relative to `max(1, max|y|)`.
        difference: Largest difference seen, likewise relative.
    """

    examples: int
    tolerance: float
    difference: float


def default_tolerance(model: keras.Model) -> float:
    """`1e-5`, or 16 units of roundoff where a layer computes in half precision."""
    units = [UNIT_ROUNDOFF.get(layer.compute_dtype, 0.0) for layer in model._flatten_layers()]
    coarsest = max(units, default=0.0)
    if coarsest <= UNIT_ROUNDOFF["float32"]:
        return _TOLERANCE
    return _HALF_PRECISION_UNITS * coarsest


def live_outputs(
    model: keras.Model, structure: Any, ports: Sequence[Port], arrays: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What the Keras model returns at inference, by the names of `serving_default`."""
    tensors = {
        port.name: keras.ops.convert_to_tensor(array, dtype=port.dtype)
        for port, array in zip(ports, arrays, strict=True)
    }
    # The comparison is served on the CPU: other devices round in other ways.
    with keras.device("cpu:0"):
        outputs = call_model(model, structure, ports, tensors)
    flat = [np.asarray(keras.ops.convert_to_numpy(leaf)) for leaf in keras.tree.flatten(outputs)]
    return dict(zip(output_names(outputs), flat, strict=True))


def compare(
    folder: str | os.PathLike,
    model: keras.Model,
    structure: Any,
    ports: Sequence[Port],
    arrays: Sequence[np.ndarray],
    plan: Plan,
    certificate: Certificate,
    expected: Mapping[str, np.ndarray],
    tolerance: float,
) -> Comparison:
    """Serves a SavedModel in a clean process and compares it with the Keras model.

    Args:
        folder: The SavedModel.
        model: The model it was made of, not condensed.
        structure: What the model is called on, symbolic tensors.
        ports: Its inputs, flat.
        arrays: The inputs to compare on, flat.
        plan: Which signatures there are.
        certificate: The certificate of the export.
        expected: Outputs of the Keras model, by name.
        tolerance: Largest difference allowed, relative to `max(1, max|y|)`.

    Raises:
        ExportError: If something differs, or a radius is larger than the certificate allows.
    """
    request = {port.name: array for port, array in zip(ports, arrays, strict=True)}
    requests = {"serving_default": request}
    if not plan.refusal:
        requests["certified"] = request
    answers = _clean_process.serve(folder, requests)
    differences = [
        _difference(name, answers["serving_default"][name], wanted, tolerance)
        for name, wanted in expected.items()
    ]
    if not plan.refusal:
        with without_activation(plan.ending.operation):
            (logits,) = live_outputs(model, structure, ports, arrays).values()
        answer = answers["certified"]
        differences.append(_difference("logits", answer["logits"], logits, tolerance))
        _check_radius(answer, certificate)
    return Comparison(len(arrays[0]), tolerance, max(differences, default=0.0))


def _difference(name: str, served: np.ndarray, wanted: np.ndarray, tolerance: float) -> float:
    if served.shape != wanted.shape:
        raise ExportError(
            f"The exported model must return {name!r} as the Keras model does. Received: shape "
            f"{served.shape} instead of {wanted.shape}"
        )
    if wanted.dtype.kind in "OSU":
        if not np.array_equal(served.astype(str), wanted.astype(str)):
            raise ExportError(f"The exported model returns other strings. Received: {name!r}")
        return 0.0
    served, wanted = served.astype(np.float64), wanted.astype(np.float64)
    same = (served == wanted) | (np.isnan(served) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        gaps = np.where(same, 0.0, np.abs(served - wanted))
    finite = np.abs(wanted[np.isfinite(wanted)])
    difference = float(gaps.max(initial=0.0)) / max(1.0, finite.max(initial=0.0))
    if not difference <= tolerance:
        raise ExportError(
            f"The exported model must return {name!r} as the Keras model does, within "
            f"{tolerance:g} * max(1, max|y|). Received: a difference of {difference:.3g}"
        )
    return difference


def _check_radius(answer: Mapping[str, np.ndarray], certificate: Certificate) -> None:
    """The served radius is never above the one the certificate gives for the served logits."""
    radius = answer["embedding_radius" if "embedding_radius" in answer else "radius"]
    allowed = certificate.certified_radius(answer["logits"])
    if not (radius <= allowed).all():
        worst = int(np.argmax(radius - allowed))
        raise ExportError(
            "The served radius must be certified. Received: radius "
            f"{radius[worst]:.9g} where the certificate allows {allowed[worst]:.9g}"
        )
