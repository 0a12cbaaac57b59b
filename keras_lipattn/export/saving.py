"""Export of a Keras model as a SavedModel that contains its certificate."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras

from keras_lipattn.certification import Certificate, certify
from keras_lipattn.export.certified_signature import CertifiedSignature, plan_signature
from keras_lipattn.export.proof import proof_of, recorded_calls
from keras_lipattn.export.serving_graph import (
    ExportError,
    relative_rounding_error,
    served_model,
    trackable,
)
from keras_lipattn.export.verification import Comparison, compare, make_reference
from keras_lipattn.export.version_folder import publish, staging_folder
from keras_lipattn.layers import condensed, lipschitz_layers
from keras_lipattn.version import __version__

SCHEMA = 1
MANIFEST = "manifest.json"
# With a larger relative error of the logits, the allowance exceeds most margins.
_COARSE = 1e-3
_OTHER_BACKEND = (
    "A SavedModel is a TensorFlow format: save the model with `model.save('model.keras')`, set "
    "KERAS_BACKEND=tensorflow, load it with `keras.saving.load_model('model.keras', "
    "compile=False)` and export it there, or run tools/export_saved_model.py on the file. "
    "Received: Keras on the backend {backend!r}"
)


class ExportedModel(NamedTuple):
    """Result of `export_saved_model`.

    Attributes:
        certificate: The `Certificate` of the exported model.
        path: Folder of the new version, a `pathlib.Path`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras_lipattn.SpectralDense(3)])
    >>> exported = keras_lipattn.export_saved_model(model, "build/dense", verbose=False)
    >>> exported.certificate.total <= 1.0, exported.path.name
    (True, '1')
    """

    certificate: Certificate
    path: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Export:
    """An export that is ready to be written.

    Args:
        signature: Plan of the signature `certified`, with the model and its certificate.
        functions: Concrete functions by the name of their signature.
        saved: Object with the variables of these functions.
        proof: Content of `proof.json`.
        kappa: Factor of the rounding allowance.
    """

    signature: CertifiedSignature
    functions: Mapping[str, Any]
    saved: Any
    proof: str
    kappa: float


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    norm: str = "l2",
    sequence_length: int | None = None,
    input_radius: float | None = None,
    assume_fixed_mask: bool = False,
    mask: Any = None,
    allow_uncertified: bool = False,
    example_batch: Any = None,
    tolerance: float | None = None,
    verbose: bool = True,
) -> ExportedModel:
    """Export a model for TensorFlow Serving, with a proof of its Lipschitz constant inside.

    The export becomes the next version in `directory`: `directory/1`, then `directory/2` and so on.
    TensorFlow Serving serves the highest version.

    ```
    directory/1/saved_model.pb, variables/, ...
    directory/1/assets.extra/certificate.json    the certificate, for `Certificate.from_json`
    directory/1/assets.extra/export.json         signatures, units, allowance, comparison
    directory/1/assets.extra/proof.json          the tensors of each layer, for `verify_export`
    directory/1/assets.extra/manifest.json       SHA-256 and size of every other file
    ```

    The layers of this package are condensed: their caps are applied once, with exact norms, and
    the capped and folded kernels are saved as constants. The graph has no power iteration, no Gram
    iteration and no decomposition, and neither raw kernels nor running vectors are saved. The
    certificate is about these constants.

    Signatures:

    - `serving_default`: the outputs of the model. Inputs go by their names, outputs by the keys of
      a dict, or `output_0` and so on.
    - `certified`, for classifiers: `logits` (before a softmax or sigmoid at the end), `class`,
      `margin` (from the largest logit to the next; for one unit the distance of its logit from 0)
      and `radius`: all inputs closer than this, in the norm of the certificate, have the same
      class. The radius is 0 for ties and for inputs that are longer than `sequence_length`, outside
      `input_radius`, or not finite. With `input_radius` it never reaches beyond that ball. For
      integers that are looked up it is called `embedding_radius` and is in units of the
      embeddings.

    An allowance for float32 arithmetic is subtracted from every margin; `export.json` states it. It
    assumes matrix products in full float32. TensorFlow uses TF32 by default on newer GPUs: switch
    it off where the radius is served (NVIDIA_TF32_OVERRIDE=0).

    Before the export is published by a rename, it is served in a new process without Keras and
    without this package, and compared with the Keras model. After a failure `directory` is as it
    was.

    Args:
        model: A built `keras.Model`.
        directory: Folder of the model, which contains its versions.
        norm: Norm of the certificate: `"l2"`, `"token"` or `"linf"`, see `certify`.
        sequence_length: Largest length of inputs whose length varies. Defaults to the smallest
            `max_sequence_length` of the layers.
        input_radius: Largest Euclidean norm of a token of the inputs. Some layers have a constant
            only with such a limit.
        assume_fixed_mask: Whether to certify for fixed masks where the model computes them.
        mask: Class of the masks of attention layers that the graph does not tell, see `certify`.
        allow_uncertified: Whether to export a model without a finite certificate, or one whose
            logits cannot be computed. The files then say so, and why.
        example_batch: Inputs for the comparison, in the structure of the model or as a dict by
            their served names. Defaults to random numbers. A model that is neither Functional nor
            Sequential is served for inputs of these shapes, and any batch size.
        tolerance: Largest difference from the Keras model, relative to `max(1, max|y|)`. Defaults
            to `1e-5`, and more where the model computes in half precision.
        verbose: Whether to print the certificate and a summary of the export.

    Returns:
        An `ExportedModel`: a named tuple of the `certificate` and the `path` of the new version.

    Raises:
        RuntimeError: With another backend than TensorFlow.
        ValueError: If an argument is out of range, or the model is not built.
        NotADirectoryError: If `directory`, or a parent of it, is a file.
        ExportError: If the model is refused, cannot be written, or differs from the Keras model.

    Example:

    >>> inputs = keras.Input((6, 8))
    >>> x = keras_lipattn.L2MultiHeadAttention(num_heads=2, key_dim=4, lipschitz_bound=1.0)(inputs)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(inputs, keras_lipattn.SpectralDense(3)(x))
    >>> certificate, path = keras_lipattn.export_saved_model(
    ...     model, "build/classifier", verbose=False
    ... )
    >>> certificate.matches(model)
    True
    >>> sorted(file.name for file in path.glob("assets.extra/*"))
    ['certificate.json', 'export.json', 'manifest.json', 'proof.json']
    """
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(_OTHER_BACKEND.format(backend=keras.config.backend()))
    import tensorflow as tf

    _check_model(model)
    folder = _absolute_directory(directory)
    served = served_model(model, example_batch, sequence_length)
    for layer in lipschitz_layers(model):
        # So that the Keras model is compared with the same norms as in the export.
        layer.condense()
    reference = make_reference(
        served, example_batch, input_radius=input_radius, tolerance=tolerance
    )
    with condensed(model):
        certificate = certify(
            model,
            norm=norm,
            sequence_length=served.sequence_length,
            input_radius=input_radius,
            assume_fixed_mask=assume_fixed_mask,
            mask=mask,
            inputs=(served.structure,),
            check=True,
        )
        signature = plan_signature(served, certificate, list(reference.outputs.values()))
        if not allow_uncertified:
            _check_certified(signature)
        export = _trace(signature)
    with _os_errors_as_export_errors(folder), staging_folder(folder) as staging:
        tf.saved_model.save(export.saved, str(staging), signatures=dict(export.functions))
        comparison = compare(staging, signature, reference)
        _write_records(export, comparison, staging / "assets.extra")
        path = publish(staging, folder)
    if verbose:
        print(certificate)
        print(_summary(path, export, comparison))
    return ExportedModel(certificate, path)


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not model.built:
        raise ValueError(
            "The model has no weights yet. Build it, or call it on data, before the export. "
            f"Received: built={model.built}"
        )


def _absolute_directory(directory: Any) -> pathlib.Path:
    if not isinstance(directory, str | os.PathLike) or not isinstance(os.fspath(directory), str):
        raise ValueError(
            f"`directory` must be a string or a path. Received: directory={directory!r}"
        )
    name = os.fspath(directory)
    if not name.strip() or "://" in name or "\0" in name:
        raise ValueError(
            "`directory` must be a local folder, where a rename publishes the export in one step. "
            f"Received: directory={directory!r}"
        )
    folder = pathlib.Path(directory).absolute()
    for parent in (folder, *folder.parents):
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise NotADirectoryError(
                    "`directory` must be a folder, or not exist yet. "
                    f"Received: {str(parent)!r}, which is not a folder"
                )
            break
    return folder


def _check_certified(signature: CertifiedSignature) -> None:
    if not signature.certificate.is_finite:
        raise ExportError(
            "The model cannot be certified. `allow_uncertified=True` exports it without a "
            f"certified radius. Received: {'; '.join(signature.certificate.reasons)}"
        )
    if signature.logits_unreachable:
        raise ExportError(
            "The logits that the certificate is about cannot be computed. "
            "`allow_uncertified=True` exports the model without the signature `certified`. "
            f"Received: a model where {signature.missing}"
        )


def _trace(signature: CertifiedSignature) -> _Export:
    """Trace the signatures of a model while it is condensed."""
    served = signature.served
    name = "serving_default"
    with recorded_calls() as calls:
        functions = {name: served.trace_outputs()}
    kappa = relative_rounding_error(functions["serving_default"].graph, served.sequence_length)
    if not signature.missing:
        name = "certified"
        with recorded_calls() as calls:
            functions[name] = signature.trace(kappa)
    proof = proof_of(calls, functions[name], name)
    saved = trackable(served.model, functions.values())
    return _Export(signature=signature, functions=functions, saved=saved, proof=proof, kappa=kappa)


@contextlib.contextmanager
def _os_errors_as_export_errors(folder: pathlib.Path) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(
            f"The export could not be written; {str(folder)!r} is as it was. Received: "
            f"{type(error).__name__}: {error}"
        ) from error


def _write_records(export: _Export, comparison: Comparison, folder: pathlib.Path) -> None:
    folder.mkdir()
    certificate = export.signature.certificate
    (folder / "certificate.json").write_text(certificate.to_json() + "\n")
    record = json.dumps(_record(export, comparison), indent=2, allow_nan=False)
    (folder / "export.json").write_text(record + "\n")
    (folder / "proof.json").write_text(export.proof + "\n")
    (folder / MANIFEST).write_text(_manifest(folder.parent) + "\n")


def _manifest(version: pathlib.Path) -> str:
    """SHA-256 and size of every file of an export, as JSON; written last."""
    files = {}
    for path in sorted(version.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(version).as_posix()
            files[name] = {"sha256": digest, "size": path.stat().st_size}
    return json.dumps({"schema": SCHEMA, "files": files}, indent=2)


def _record(export: _Export, comparison: Comparison) -> dict[str, Any]:
    """Content of `export.json`."""
    import tensorflow as tf

    signature, certificate = export.signature, export.signature.certificate
    return {
        "schema": SCHEMA,
        "model": certificate.model,
        "certified": certificate.is_finite,
        "reason": "; ".join(certificate.reasons),
        "constant": certificate.total if certificate.is_finite else "inf",
        "norm": certificate.norm,
        "output": certificate.threat_model.output,
        "sequence_length": signature.served.sequence_length,
        "input_radius": _finite_or_none(certificate.threat_model.input_radius),
        "assumed_fixed_masks": list(certificate.threat_model.assumed_masks),
        "signatures": {
            name: {
                "inputs": _shapes(function.structured_input_signature[1]),
                "outputs": _shapes(function.structured_outputs),
            }
            for name, function in export.functions.items()
        },
        "certified_signature": signature.describe(),
        "rounding": {
            "kappa": export.kappa,
            "allowance": "2 kappa (constant |x| + max(1, max|logit|)), half of it for one unit",
            "arithmetic": "sums and products in the dtypes of the graph, float32 without TF32",
        },
        "comparison": dataclasses.asdict(comparison),
        "fingerprint": certificate.fingerprint,
        "versions": {
            "keras": keras.__version__,
            "keras_lipattn": __version__,
            "tensorflow": tf.__version__,
        },
    }


def _shapes(specs: Any) -> dict[str, Any]:
    return {
        name: {"shape": list(spec.shape), "dtype": spec.dtype.name} for name, spec in specs.items()
    }


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _summary(path: pathlib.Path, export: _Export, comparison: Comparison) -> str:
    certificate, missing = export.signature.certificate, export.signature.missing
    lines = [
        f"exported to {path}",
        f"served in a clean process: {comparison.examples} examples differ by at most "
        f"{comparison.difference:.1e} from Keras (allowed: {comparison.tolerance:g})",
    ]
    if not certificate.is_finite:
        lines.append("NOT CERTIFIED: " + "; ".join(certificate.reasons))
    elif missing:
        lines.append(f"no signature `certified`: {missing}")
    elif export.kappa > _COARSE:
        lines.append(
            f"half precision: the rounding allowance is {2.0 * export.kappa:.1g} (constant |x| + "
            "max|logit|), so almost no radius is above 0; build the model under the float32 policy "
            "to get radii"
        )
    return "\n".join(lines)
