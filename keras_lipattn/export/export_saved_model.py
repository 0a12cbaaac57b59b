"""Exporting a Keras model as a SavedModel that carries its certificate."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_lipattn.certification import Certificate, certify
from keras_lipattn.certification.tracing import call_specs, function_of
from keras_lipattn.export._comparison import Comparison, compare, default_tolerance, live_outputs
from keras_lipattn.export._example import example_arrays, made_up_arrays
from keras_lipattn.export._plan import Plan, make_plan
from keras_lipattn.export._ports import input_ports
from keras_lipattn.export._staging import staged
from keras_lipattn.export._tracing import Traced, trace
from keras_lipattn.export.export_error import ExportError
from keras_lipattn.layers import condensed, lipschitz_layers
from keras_lipattn.version import __version__

SCHEMA = 1
# A relative error of the logits that eats most margins.
_COARSE = 1e-3
_OTHER_BACKEND = (
    "A SavedModel is a TensorFlow format: save the model with `model.save('model.keras')`, set "
    "KERAS_BACKEND=tensorflow, load it with `keras.saving.load_model('model.keras', "
    "compile=False)` and export it there, or run tools/export_saved_model.py on the file. "
    "Received: Keras on the backend {backend!r}"
)


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    norm: str = "l2",
    sequence_length: int | None = None,
    input_radius: float | None = None,
    assume_fixed_mask: bool = False,
    mask: Any = None,
    allow_uncertified: bool = False,
    example_batch: Any = None,
    tolerance: float | None = None,
    version: int = 1,
    overwrite: bool = False,
    verbose: bool = True,
) -> Certificate:
    """Writes a SavedModel for TensorFlow Serving, with a proof of its Lipschitz constant inside.

    The layers of this package are condensed: their caps are applied once, with exact norms, and
    the folded kernels become constants. The graph holds no power iteration, no Gram iteration and
    no decomposition, and neither raw kernels nor running vectors are saved. The certificate is
    made for these very constants.

    ```
    path/1/saved_model.pb, variables/, ...
    path/1/assets.extra/certificate.json    the certificate, read by `Certificate.from_json`
    path/1/assets.extra/export.json         signatures, units, allowance, how it was compared
    ```

    Signatures:

    - `serving_default`: what the model returns. Inputs go by their names, outputs by the keys of a
      dict, or `output_0` and so on.
    - `certified`, for classifiers: `logits` (before a softmax or sigmoid at the end), `class`,
      `margin` (from the largest logit to the next; for one unit the distance of its logit from 0)
      and `radius`: all inputs closer than this, in the norm of the certificate, have the same
      class. It is 0 at ties, for inputs that are longer than `sequence_length`, outside
      `input_radius`, or not finite; with `input_radius` it never reaches beyond that ball. For
      integers that are looked up it is called `embedding_radius` and is in units of the
      embeddings.

    From every margin an allowance for float32 arithmetic is taken, stated in `export.json`. It is
    for products in full float32: TF32, the default of TensorFlow on newer GPUs, must be switched
    off where the radius is served (NVIDIA_TF32_OVERRIDE=0).

    Before it is published, by a rename, the export is served in a new process without Keras and
    without this package, and compared with the Keras model. Whatever fails leaves `path` as it was.

    Args:
        model: A built `keras.Model`.
        path: Folder of the model, without the version.
        norm: Norm of the certificate: `"l2"`, `"token"` or `"linf"`, see `certify`.
        sequence_length: Largest length of inputs whose length varies. By default the least
            `max_sequence_length` of the layers.
        input_radius: Largest Euclidean norm of a token of the inputs; some layers have a constant
            only then.
        assume_fixed_mask: Whether to certify for fixed masks where the model computes them.
        mask: Class of the masks of attention layers that the graph does not tell, see `certify`.
        allow_uncertified: Whether to export a model without a finite certificate, or one whose
            logits cannot be reached. The files then say so, and why.
        example_batch: Inputs to compare on, in the structure of the model or as a dict by their
            served names; made up by default. A model that is not Functional or Sequential is
            served for inputs of these shapes, and any batch size.
        tolerance: Largest difference from the Keras model, relative to `max(1, max|y|)`. By
            default `1e-5`, more where the model computes in half precision.
        version: Version for TensorFlow Serving, which serves the highest.
        overwrite: Whether to replace a SavedModel of this version. The old one stays until the new
            one takes its place.
        verbose: Whether to print the certificate and what was exported.

    Returns:
        The `Certificate`.

    Raises:
        RuntimeError: Under another backend than TensorFlow.
        ValueError: If an argument is out of range, or the model is not built.
        FileExistsError: If this version exists and `overwrite` is false, or it is no SavedModel.
        NotADirectoryError: If `path`, or something above it, is a file.
        ExportError: If the model is refused, cannot be written, or differs from the Keras model.

    Example:

    >>> inputs = keras.Input((6, 8))
    >>> x = keras_lipattn.L2MultiHeadAttention(num_heads=2, key_dim=4, lipschitz_bound=1.0)(inputs)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(inputs, keras_lipattn.SpectralDense(3)(x))
    >>> certificate = keras_lipattn.export_saved_model(model, "build/classifier", verbose=False)
    >>> certificate.matches(model)
    True
    """
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(_OTHER_BACKEND.format(backend=keras.config.backend()))
    _check_model(model)
    target = _resolve_target(path, version, overwrite)
    if tolerance is None:
        tolerance = default_tolerance(model)
    structure = _input_structure(model, example_batch, sequence_length)
    ports = input_ports(structure)
    if sequence_length is None and any(port.dynamic_axes for port in ports):
        sequence_length = _own_length(model)
    if example_batch is None:
        arrays = made_up_arrays(
            model, ports, sequence_length=sequence_length, input_radius=input_radius
        )
    else:
        arrays = example_arrays(example_batch, ports)
    for layer in lipschitz_layers(model):
        # The same norms as those of the export.
        layer.condense()
    expected = live_outputs(model, structure, ports, arrays)
    with condensed(model):
        certificate = certify(
            model,
            norm=norm,
            sequence_length=sequence_length,
            input_radius=input_radius,
            assume_fixed_mask=assume_fixed_mask,
            mask=mask,
            inputs=(structure,),
            check=True,
        )
        plan = make_plan(
            model, structure, ports, certificate, list(expected.values()), sequence_length
        )
        _check_promise(certificate, plan, allow_uncertified)
        traced = trace(model, structure, ports, plan, certificate, sequence_length)
    with _as_export_errors(target), staged(target, overwrite=overwrite) as folder:
        _save(traced, folder)
        comparison = compare(
            folder, model, structure, ports, arrays, plan, certificate, expected, tolerance
        )
        extra = folder / "assets.extra"
        extra.mkdir()
        (extra / "certificate.json").write_text(certificate.to_json() + "\n")
        record = _record(certificate, plan, traced, comparison, sequence_length)
        (extra / "export.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    if verbose:
        print(certificate)
        print(_summary(target, plan, traced, certificate, comparison))
    return certificate


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not model.built:
        raise ValueError(
            "The model has no weights yet: build it, or call it on data, before exporting it. "
            f"Received: built={model.built}"
        )


def _resolve_target(path: Any, version: Any, overwrite: bool) -> pathlib.Path:
    """Absolute path of the version's folder, if it may be written."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ValueError(f"`path` must be a string or a path. Received: path={path!r}")
    if not os.fspath(path).strip() or "://" in os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(
            "`path` must be a local folder: only there can an export be published in one step. "
            f"Received: path={path!r}"
        )
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"`version` must be a positive integer. Received: version={version!r}")
    folder = pathlib.Path(path).absolute()
    for parent in (folder, *folder.parents):
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise NotADirectoryError(
                    f"`path` must name a folder, or nothing yet. Received: {str(parent)!r}, which "
                    "is something else"
                )
            break
    target = folder / str(version)
    if os.path.lexists(target):
        if not overwrite:
            raise FileExistsError(
                "This version exists: choose another `version`, or `overwrite=True`. "
                f"Received: {str(target)!r}"
            )
        if not (target / "saved_model.pb").is_file():
            raise FileExistsError(
                f"`overwrite=True` replaces a SavedModel only. Received: {str(target)!r} without a "
                "saved_model.pb in it"
            )
    return target


def _input_structure(model: keras.Model, example_batch: Any, sequence_length: int | None) -> Any:
    """What the model is called on, as symbolic tensors."""
    function = function_of(model)
    if function is not None:
        return function.input
    if example_batch is not None:
        return keras.tree.map_structure(lambda leaf: _symbol(leaf, sequence_length), example_batch)
    try:
        arguments = call_specs(model)[0]
    except ValueError as error:
        raise ValueError(
            "A model that is not Functional or Sequential needs an `example_batch`, for the shapes "
            f"of its inputs. Received: example_batch={example_batch}"
        ) from error
    if len(arguments) != 1:
        raise ValueError(
            "The model must take its inputs as one argument, a tensor, list or dict. "
            f"Received: {len(arguments)} arguments"
        )
    return keras.tree.map_structure(lambda leaf: _symbol(leaf, sequence_length), arguments[0])


def _symbol(leaf: Any, sequence_length: int | None) -> keras.KerasTensor:
    if not isinstance(leaf, keras.KerasTensor):
        leaf = keras.ops.convert_to_tensor(leaf)
    sizes = list(leaf.shape)
    if sequence_length is not None and len(sizes) > 2:
        sizes[1] = None
    return keras.KerasTensor((None, *sizes[1:]), dtype=leaf.dtype)


def _own_length(model: keras.Model) -> int | None:
    """The least number of tokens that the layers of the model are made for."""
    lengths = [getattr(layer, "max_sequence_length", None) for layer in lipschitz_layers(model)]
    return min((length for length in lengths if length is not None), default=None)


def _check_promise(certificate: Certificate, plan: Plan, allow_uncertified: bool) -> None:
    if allow_uncertified:
        return
    if not certificate.is_finite:
        raise ExportError(
            "The model cannot be certified; `allow_uncertified=True` exports it all the same, and "
            f"says so. Received: {'; '.join(certificate.reasons)}"
        )
    if plan.unreachable:
        raise ExportError(
            "The logits that a certificate would speak of cannot be served; "
            "`allow_uncertified=True` exports the model without the signature `certified`. "
            f"Received: a model of which {plan.refusal}"
        )


@contextlib.contextmanager
def _as_export_errors(target: pathlib.Path) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(
            f"The export could not be written; {str(target)!r} is as it was. Received: "
            f"{type(error).__name__}: {error}"
        ) from error


def _save(traced: Traced, folder: pathlib.Path) -> None:
    import tensorflow as tf

    tf.saved_model.save(traced.holder, str(folder), signatures=dict(traced.signatures))


def _record(
    certificate: Certificate,
    plan: Plan,
    traced: Traced,
    comparison: Comparison,
    sequence_length: int | None,
) -> dict[str, Any]:
    """The content of `export.json`."""
    import tensorflow as tf

    kappa = traced.relative_error
    return {
        "schema": SCHEMA,
        "model": certificate.model,
        "certified": certificate.is_finite,
        "reason": "; ".join(certificate.reasons),
        "constant": certificate.total if certificate.is_finite else "inf",
        "norm": certificate.norm,
        "output": certificate.threat_model.output,
        "sequence_length": sequence_length,
        "input_radius": _finite_or_none(certificate.threat_model.input_radius),
        "assumed_fixed_masks": list(certificate.threat_model.assumed_masks),
        "signatures": {
            name: {
                "inputs": _shapes(function.structured_input_signature[1]),
                "outputs": _shapes(function.structured_outputs),
            }
            for name, function in traced.signatures.items()
        },
        "certified_signature": plan.words(certificate) or {"missing": plan.refusal},
        "rounding": {
            "kappa": kappa,
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


def _summary(
    target: pathlib.Path,
    plan: Plan,
    traced: Traced,
    certificate: Certificate,
    comparison: Comparison,
) -> str:
    lines = [
        f"exported to {target}",
        f"served in a clean process: {comparison.examples} examples differ by at most "
        f"{comparison.difference:.1e} from Keras (allowed: {comparison.tolerance:g})",
    ]
    if not certificate.is_finite:
        lines.append("NOT CERTIFIED: " + "; ".join(certificate.reasons))
    elif plan.refusal:
        lines.append(f"no signature `certified`: {plan.refusal}")
    elif traced.relative_error > _COARSE:
        lines.append(
            "half precision: rounding is allowed for by "
            f"{2.0 * traced.relative_error:.1g} (constant |x| + max|logit|), so that hardly any "
            "radius is above 0; build the model under the float32 policy for radii"
        )
    return "\n".join(lines)
