"""`verify_export`: an independent check of an export, from its files alone."""

import dataclasses
import math
import os
import pathlib

import numpy as np

from keras_lipattn.checker import operations
from keras_lipattn.checker.activations import value
from keras_lipattn.checker.artifact import (
    FOLDER,
    StatedCertificate,
    check_manifest,
    check_record,
    read_json,
    read_proof,
)
from keras_lipattn.checker.loading import load
from keras_lipattn.checker.propagation import Propagation, pairwise
from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.served_function import ServedFunction
from keras_lipattn.checker.trials import attack, try_radii
from keras_lipattn.linalg import SAFETY

# Largest relative difference between a recomputed number and the certified one.
_TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `verify_export`; true if the export is verified.

    Args:
        verified: Whether every check passed.
        reason: Why not, in one line; empty if it is verified.
        certified: The total that the certificate states, NaN if it was not read.
        recomputed: The total from the served weights, NaN if it was not computed.
        steps: Number of steps of the proof that were checked.

    Example:

    >>> from keras_lipattn.export import verify_export
    >>> model = keras.Sequential([keras.Input((4,)), keras_lipattn.SpectralDense(3)])
    >>> certificate, path = keras_lipattn.export_saved_model(model, "build/dense", verbose=False)
    >>> verification = verify_export(path)
    >>> bool(verification), verification.certified == certificate.total
    (True, True)
    >>> size = (path / "added.txt").write_text("")
    >>> verify_export(path).verified
    False
    """

    verified: bool
    reason: str = ""
    certified: float = math.nan
    recomputed: float = math.nan
    steps: int = 0

    def __bool__(self) -> bool:
        return self.verified

    def __str__(self) -> str:
        if not self.verified:
            return f"not verified: {self.reason}"
        return (
            f"verified: {self.steps} steps give the total {self.recomputed:.9g}, the certificate "
            f"states {self.certified:.9g}"
        )


def verify_export(path: str | os.PathLike) -> Verification:
    """Check an export of `export_saved_model` from its files alone.

    TensorFlow loads the graph and the variables; neither Keras nor the Python code of the model has
    a part in it. The check shares no code with the export and with `certify`, apart from the
    theorems (`keras_lipattn.bounds`) and operator norms (`keras_lipattn.linalg`).

    - Every file has the SHA-256 and the size that the manifest states; none is missing or added.
    - The certificate has its own hash, and its entries are in their ranges.
    - Each step of `proof.json` names two or more tensors of the served graph. Nothing else leads
      from the ones to the other, the operations between are those of its kind of layer, and on
      random inputs they give, in float64, what the definition of the layer gives for the arrays
      found in the graph.
    - The constants of all steps, computed from these arrays in float64, give the total and the
      constants of pairs of classes of the certificate, within a relative error of 1e-9.
    - TensorFlow Serving, which reads other parts of a SavedModel than Python, serves the same.
    - `serving_default` computes the same logits as `certified`, and then the stated softmax or
      sigmoid. The class and margin of `certified` are those of its logits.
    - The radii of `certified` are at most those that the certificate allows, for logits that try
      every pair of classes, and 0 outside of what is certified.
    - No pair of inputs found by random search and gradient ascent refutes the total.

    Args:
        path: Folder of one version, for instance `build/classifier/1`.

    Returns:
        A `Verification`, which is false with a reason for anything that is not as above, and for
        layers that have no independent check.

    Example:

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, keras_lipattn.SpectralDense(3)(inputs))
    >>> _, path = keras_lipattn.export_saved_model(model, "build/small", verbose=False)
    >>> found = keras_lipattn.export.verify_export(path)
    >>> found.verified, found.steps
    (True, 1)
    >>> (path / "variables" / "note.txt").write_text("added")
    5
    >>> print(keras_lipattn.export.verify_export(path))
    not verified: file variables/note.txt is not in the manifest
    """
    stated: list[float] = []
    try:
        return _verify(pathlib.Path(path), stated)
    except NotVerified as error:
        reason = error.reason
    except Exception as error:
        # The files may hold anything, and what cannot be checked is not verified.
        reason = " ".join(f"the check failed with {type(error).__name__}: {error}".split())[:500]
    return Verification(verified=False, reason=reason, certified=[*stated, math.nan][0])


def _verify(export: pathlib.Path, stated: list[float]) -> Verification:
    require(export.is_dir(), f"{str(export)!r} is not a folder")
    check_manifest(export)
    certificate = StatedCertificate(read_json(export / FOLDER / "certificate.json"))
    stated.append(certificate.total)
    require(math.isfinite(certificate.total), "nothing finite is certified")
    signature, output, entries = read_proof(read_json(export / FOLDER / "proof.json"))
    functions = load(export)
    require(
        signature == ("certified" if "certified" in functions else "serving_default"),
        f"the proof is of the signature {signature!r}",
    )
    served = functions[signature]
    logits = _output(served, certificate)
    require(served.tensor(output) == logits, f"the proof ends at {output!r}, not at the output")
    propagation = Propagation(served, certificate, entries)
    bounds = propagation.bounds_of(logits)
    total = SAFETY * math.exp(bounds.log) if bounds.log < 709.0 else math.inf
    require(
        math.isclose(total, certificate.total, rel_tol=_TOLERANCE),
        f"the served weights give the total {total:.9g}, the certificate states "
        f"{certificate.total:.9g}",
    )
    _check_source(propagation, certificate)
    _check_pairs(certificate, pairwise(bounds, certificate, total))
    check_record(read_json(export / FOLDER / "export.json"), certificate)
    if signature == "certified":
        _check_default(functions, logits, certificate, propagation.sizes(logits)[-1])
        try_radii(propagation, logits)
    attack(propagation, logits)
    return Verification(
        verified=True, certified=certificate.total, recomputed=total, steps=propagation.checked
    )


def _output(served: ServedFunction, certificate: StatedCertificate) -> str:
    """The tensor that the certificate is about."""
    if served.name == "certified":
        radii = {"radius", "embedding_radius"} & set(served.outputs)
        fits = len(radii) == 1 and set(served.outputs) == {"logits", "class", "margin"} | radii
        require(fits, f"the outputs of `certified` are {sorted(served.outputs)}")
        is_classifier = certificate.head not in ("", "token logits")
        require(is_classifier, "a signature `certified` for a model that is no classifier")
        return served.outputs["logits"]
    require(
        certificate.head not in ("softmax", "sigmoid"),
        "the certificate is about logits, and no signature returns them",
    )
    require(len(served.outputs) == 1, "no independent check of models with several outputs")
    return next(iter(served.outputs.values()))


def _check_source(propagation: Propagation, certificate: StatedCertificate) -> None:
    floats = [name for name, (_, dtype) in propagation.served.specs.items() if "float" in dtype]
    looked_up = [str(name).startswith("output of ") for name in certificate.inputs]
    require(
        len(certificate.inputs) == 1 and len(propagation.sources) == 1 and len(floats) <= 1,
        "no independent check of models with several certified inputs",
    )
    require(
        looked_up[0] == (not floats), "the certified input of the certificate is not the served one"
    )


def _check_pairs(certificate: StatedCertificate, recomputed: np.ndarray | None) -> None:
    pairs = np.asarray(certificate.pairs, np.float64)
    if recomputed is None:
        require(not pairs.size, "pairwise constants for a model that is no classifier")
        return
    require(pairs.shape == recomputed.shape, "the pairwise constants are of other classes")
    off = ~np.isclose(pairs, recomputed, rtol=_TOLERANCE, atol=0.0)
    if off.any():
        first, second = (int(index) for index in np.argwhere(off)[0])
        raise NotVerified(
            f"the served weights give {recomputed[first, second]:.9g} for classes {first} and "
            f"{second}, the certificate states {pairs[first, second]:.9g}"
        )


def _check_default(
    functions: dict[str, ServedFunction],
    logits: str,
    certificate: StatedCertificate,
    sizes: tuple[int, ...],
) -> None:
    """Refuse a `serving_default` that does not compute the certified logits."""
    default = functions["serving_default"]
    require(len(default.outputs) == 1, "no independent check of models with several outputs")
    (output,) = default.outputs.values()
    wanted = functions["certified"].fingerprint(logits)
    same = [tensor for tensor in default.ancestors(output) if default.fingerprint(tensor) == wanted]
    require(bool(same), "`serving_default` does not compute the logits of `certified`")
    start = default.original(same[0])
    region = default.region(output, [start])
    region.check_operations(operations.HEAD, "the head of `serving_default`")
    z = 5.0 * np.random.default_rng(3).normal(size=(8, *sizes))
    (found,) = default.run({start: z}, [output], precise=True)
    heads = {"softmax": ("softmax", "log_softmax"), "sigmoid": ("sigmoid",)}
    expected = [value(name, z) for name in heads.get(str(certificate.head), ("linear",))]
    require(
        any(found.shape == one.shape and np.allclose(found, one, rtol=1e-9) for one in expected),
        "the head of `serving_default` is not the one that the certificate states",
    )
