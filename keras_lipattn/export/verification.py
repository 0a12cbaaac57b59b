"""Comparison of an exported model, served in a process without Keras, with the Keras model."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_lipattn._temporary_names import temporary_folder
from keras_lipattn.certification import Certificate
from keras_lipattn.export.certified_signature import CertifiedSignature
from keras_lipattn.export.serving_graph import ExportError, ServedModel
from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# Size of a random batch.
_BATCH = 3
_LENGTH = 16
_TOLERANCE = 1e-5
# In half precision, sums in different orders differ by a few units of the last place.
_HALF_PRECISION_UNITS = 16
_PROGRAM = pathlib.Path(__file__).with_name("_serving_program.py")
_TIMEOUT_SECONDS = 900
Answers = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Example inputs and the outputs of the Keras model for them.

    Args:
        inputs: Arrays by name.
        outputs: Arrays by their names in `serving_default`.
        tolerance: Largest difference allowed, relative to `max(1, max|y|)`.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Args:
        examples: Number of examples.
        tolerance: Largest difference allowed, relative to `max(1, max|y|)`.
        difference: Largest difference found, relative to the same.
    """

    examples: int
    tolerance: float
    difference: float


def make_reference(
    served: ServedModel,
    example_batch: Any,
    *,
    input_radius: float | None,
    tolerance: float | None,
) -> Reference:
    """Run the Keras model on an example.

    Args:
        served: The model and its inputs.
        example_batch: Inputs in the structure of the model, or a dict by the names of
            `served.inputs`. If `None`, random numbers.
        input_radius: Largest Euclidean norm of a token of the random numbers.
        tolerance: Largest difference allowed. If `None`, `1e-5`, or 16 units of roundoff if a layer
            computes in half precision.

    Raises:
        ValueError: If the example does not fit the inputs of the model, or an input does not take
            numbers.
    """
    if example_batch is None:
        inputs = _random_inputs(served, input_radius)
    else:
        inputs = _given_inputs(served, example_batch)
    if tolerance is None:
        layers = served.model._flatten_layers()
        units = max((UNIT_ROUNDOFF.get(layer.compute_dtype, 0.0) for layer in layers), default=0.0)
        is_half = units > UNIT_ROUNDOFF["float32"]
        tolerance = _HALF_PRECISION_UNITS * units if is_half else _TOLERANCE
    return Reference(inputs=inputs, outputs=served.predict(inputs), tolerance=tolerance)


def _given_inputs(served: ServedModel, batch: Any) -> dict[str, np.ndarray]:
    names = [entry.name for entry in served.inputs]
    if isinstance(batch, Mapping) and set(names) == set(batch):
        batch = [batch[name] for name in names]
    arrays = [np.asarray(keras.ops.convert_to_numpy(leaf)) for leaf in keras.tree.flatten(batch)]
    if len(arrays) != len(names):
        raise ValueError(
            f"`example_batch` must hold the {len(names)} inputs of the model. "
            f"Received: {len(arrays)} arrays"
        )
    rows = {array.shape[0] if array.ndim else 0 for array in arrays}
    for array, entry in zip(arrays, served.inputs, strict=True):
        fits = len(array.shape) == len(entry.shape) and all(
            size is None or size == got for size, got in zip(entry.shape, array.shape, strict=True)
        )
        if not fits or len(rows) > 1 or 0 in rows:
            raise ValueError(
                f"`example_batch` must hold examples of shape {entry.shape} for input "
                f"{entry.name!r}. Received: shape {array.shape}"
            )
    return dict(zip(names, arrays, strict=True))


def _random_inputs(served: ServedModel, input_radius: float | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    vocabulary = [
        layer.input_dim for layer in served.model._flatten_layers() if hasattr(layer, "input_dim")
    ]
    length = min(_LENGTH, served.sequence_length or _LENGTH)
    arrays = {}
    for entry in served.inputs:
        shape = (_BATCH, *(length if size is None else size for size in entry.shape[1:]))
        if entry.is_floating:
            array = rng.normal(size=shape)
            if input_radius is not None:
                norms = np.linalg.norm(array, axis=-1, keepdims=True)
                array *= 0.5 * input_radius / np.maximum(norms, 1e-12)
        elif entry.dtype == "bool":
            array = rng.random(shape) < 0.8
        elif entry.dtype == "uint8":
            array = rng.integers(0, 256, shape)
        elif entry.dtype.startswith(("int", "uint")):
            array = rng.integers(0, min(vocabulary, default=2), shape)
        else:
            raise ValueError(
                f"An `example_batch` is needed for input {entry.name!r}, which does not take "
                f"numbers. Received: dtype={entry.dtype}"
            )
        # numpy has no bfloat16.
        dtype = "float32" if entry.dtype == "bfloat16" else entry.dtype
        arrays[entry.name] = array.astype(dtype)
    return arrays


def compare(
    folder: str | os.PathLike, signature: CertifiedSignature, reference: Reference
) -> Comparison:
    """Serve a SavedModel in a clean process and compare it with the Keras model.

    Args:
        folder: The SavedModel.
        signature: Plan of its signature `certified`. Its model must not be condensed any more.
        reference: Inputs and outputs of the Keras model.

    Raises:
        ExportError: If an output differs, or a radius is larger than the certificate allows.
    """
    names = ["serving_default"] if signature.missing else ["serving_default", "certified"]
    answers = serve(folder, dict.fromkeys(names, reference.inputs))
    tolerance = reference.tolerance
    differences = [
        _difference(name, answers["serving_default"][name], expected, tolerance)
        for name, expected in reference.outputs.items()
    ]
    if not signature.missing:
        answer = answers["certified"]
        expected = signature.expected_logits(reference.inputs)
        differences.append(_difference("logits", answer["logits"], expected, tolerance))
        _check_radius(answer, signature.radius_name, signature.certificate)
    examples = len(next(iter(reference.inputs.values())))
    return Comparison(examples, tolerance, max(differences, default=0.0))


def _difference(name: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    if got.shape != expected.shape:
        raise ExportError(
            f"The exported model must return {name!r} as the Keras model does. Received: shape "
            f"{got.shape} instead of {expected.shape}"
        )
    if expected.dtype.kind in "OSU":
        if not np.array_equal(got.astype(str), expected.astype(str)):
            raise ExportError(f"The exported model returns other strings. Received: {name!r}")
        return 0.0
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        gaps = np.where(same, 0.0, np.abs(got - expected))
    finite = np.abs(expected[np.isfinite(expected)])
    difference = float(gaps.max(initial=0.0)) / max(1.0, finite.max(initial=0.0))
    if not difference <= tolerance:
        raise ExportError(
            f"The exported model must return {name!r} as the Keras model does, within "
            f"{tolerance:g} * max(1, max|y|). Received: a difference of {difference:.3g}"
        )
    return difference


def _check_radius(
    answer: Mapping[str, np.ndarray], radius_name: str, certificate: Certificate
) -> None:
    radius, allowed = answer[radius_name], certificate.certified_radius(answer["logits"])
    if not (radius <= allowed).all():
        worst = int(np.argmax(radius - allowed))
        raise ExportError(
            "The served radius must be certified. Received: radius "
            f"{radius[worst]:.9g} where the certificate allows {allowed[worst]:.9g}"
        )


def serve(folder: str | os.PathLike, requests: Mapping[str, Mapping[str, np.ndarray]]) -> Answers:
    """Load a SavedModel in a new process and call its signatures there, on the CPU.

    Args:
        folder: The SavedModel.
        requests: Maps the name of a signature to its named inputs.

    Returns:
        Maps the name of a signature to its named outputs.

    Raises:
        ExportError: If the process fails. The message ends with its output.
    """
    with temporary_folder("requests") as exchange:
        asked, answered = str(exchange / "asked.npz"), str(exchange / "answered.npz")
        arrays: dict[str, Any] = {
            f"{signature}:{name}": _plain(array)
            for signature, inputs in requests.items()
            for name, array in inputs.items()
        }
        np.savez(asked, **arrays)
        # -P: Python must not search the folder of the program, which is in this package.
        command = [sys.executable, "-P", str(_PROGRAM), os.fspath(folder), asked, answered]
        # This process may hold all the memory of the accelerator.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        try:
            run = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                "The exported model did not answer in a new process. "
                f"Received: no answer in {_TIMEOUT_SECONDS} seconds"
            ) from error
        if run.returncode != 0:
            raise ExportError(
                "The exported model cannot be served in a process without Keras. "
                f"Received: exit code {run.returncode} and\n{run.stderr[-3000:]}"
            )
        answers: Answers = {}
        with np.load(answered, allow_pickle=False) as content:
            for key in content.files:
                signature, name = key.split(":", 1)
                answers.setdefault(signature, {})[name] = content[key]
        return answers


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that numpy can save: bfloat16 as float32, objects as strings."""
    if array.dtype.kind == "V":
        return array.astype(np.float32)
    return array.astype(str) if array.dtype.kind in "OS" else array
