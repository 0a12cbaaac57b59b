"""The files of an export: the manifest, the certificate and the proof."""

import hashlib
import json
import math
import os
import pathlib
from typing import Any

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.checker.refusal import NotVerified, require

FOLDER = "assets.extra"
_CERTIFICATE_SCHEMA = 2
_PROOF_SCHEMA = 1
_MANIFEST_SCHEMA = 1
# Entries of a certificate that are computed from others and not covered by its hash.
_DERIVED = ("schema", "vacuous", "reasons", "proposals")
_HEADS = ("", "softmax", "sigmoid", "logits", "logit", "token logits")
# Far more than a certificate or a proof of any model takes.
_LARGEST = 1 << 28


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, in which no name occurs twice."""
    try:
        require(path.stat().st_size <= _LARGEST, f"{path.name} is too large")
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise NotVerified(f"{path.name} cannot be read: {error}") from error
    require(isinstance(content, dict), f"{path.name} does not hold a JSON object")
    return content


def check_manifest(export: pathlib.Path) -> None:
    """Compare every file of an export with its manifest."""
    path = export / FOLDER / "manifest.json"
    manifest = read_json(path)
    require(
        set(manifest) == {"schema", "files"}
        and _is(manifest["schema"], _MANIFEST_SCHEMA)
        and isinstance(manifest["files"], dict),
        f"manifest.json is no manifest of schema {_MANIFEST_SCHEMA}",
    )
    # No byte of it is free.
    canonical = json.dumps(manifest, indent=2) + "\n"
    require(path.read_text(encoding="utf-8") == canonical, "manifest.json was written anew")
    stated = manifest["files"]
    own = f"{FOLDER}/manifest.json"
    found = set()
    for root, folders, files in os.walk(export):
        for name in (*folders, *files):
            path = pathlib.Path(root, name)
            label = path.relative_to(export).as_posix()
            require(not path.is_symlink(), f"{label} is a link")
            if name in files:
                require(path.is_file(), f"{label} is not a plain file")
                found.add(label)
    require(own not in stated, "the manifest lists itself")
    for label in sorted(set(stated) - found):
        raise NotVerified(f"file {label} is missing")
    for label in sorted(found - set(stated) - {own}):
        raise NotVerified(f"file {label} is not in the manifest")
    for label, entry in stated.items():
        valid = isinstance(entry, dict) and set(entry) == {"sha256", "size"}
        require(valid, f"the manifest has no SHA-256 and size of {label}")
        size = (export / label).stat().st_size
        require(_is(size, entry["size"]), f"file {label} has another size")
        with open(export / label, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        require(same, f"file {label} has another SHA-256")


class StatedCertificate:
    """The numbers of a certificate that are checked.

    Args:
        content: The JSON of the certificate.

    Attributes:
        total: The Lipschitz constant.
        norm: `"l2"`, `"token"` or `"linf"`.
        head: Kind of classifier.
        pairs: Pairwise constants, shape `(classes, classes)` as nested lists, or empty.
        inputs: Names of the certified inputs.
        input_radius: Radius of the ball of the tokens.
        max_tokens: Largest number of tokens, or `None`.
    """

    def __init__(self, content: dict[str, Any]):
        require(
            _is(content.get("schema"), _CERTIFICATE_SCHEMA),
            f"certificate.json is no certificate of schema {_CERTIFICATE_SCHEMA}",
        )
        entries = {key: value for key, value in content.items() if key not in _DERIVED}
        stated_hash = entries.pop("content_hash", None)
        canonical = json.dumps(entries, sort_keys=True, separators=(",", ":"))
        require(
            hashlib.sha256(canonical.encode()).hexdigest() == stated_hash,
            "the certificate does not have its own hash",
        )
        threat = entries.get("threat_model")
        require(isinstance(threat, dict), "the certificate has no threat model")
        assert isinstance(threat, dict)
        self.norm: Any = threat.get("norm")
        require(self.norm in NORMS, f"the certificate has an unknown norm {self.norm!r}")
        self.total = _number(entries.get("total"), "total")
        log10 = _number(entries.get("log10"), "log10", least=-math.inf)
        power = math.exp(log10 * math.log(10.0)) if log10 < 308.0 else math.inf
        require(
            math.isclose(self.total, power, rel_tol=1e-9, abs_tol=1e-300)
            or (math.isinf(self.total) and log10 >= 308.0),
            f"the total {self.total:g} of the certificate is not 10 to the power {log10:g}",
        )
        self.head = entries.get("head")
        require(self.head in _HEADS, f"the certificate has an unknown head {self.head!r}")
        self.input_radius = _number(threat.get("input_radius"), "input_radius")
        self.max_tokens: Any = threat.get("max_tokens")
        require(
            self.max_tokens is None or (type(self.max_tokens) is int and self.max_tokens >= 1),
            f"the certificate states max_tokens={self.max_tokens!r}",
        )
        self.inputs: Any = threat.get("inputs")
        require(isinstance(self.inputs, list), "the certificate lists no inputs")
        self.pairs = _pairs(entries.get("pairwise_constants"))
        if threat.get("radius") != "inf" or threat.get("center"):
            raise NotVerified("no independent check of local certificates")
        for name in ("mask", "assumed_masks", "shapes", "lost"):
            if threat.get(name):
                raise NotVerified(f"no independent check of the assumption {name!r}")

    @property
    def limit(self) -> float | None:
        """The radius of the ball of the tokens, `None` without a limit."""
        return None if math.isinf(self.input_radius) else self.input_radius


def check_record(record: dict[str, Any], certificate: StatedCertificate) -> None:
    """Compare the numbers that `export.json` repeats with the certificate."""
    expected = {
        "constant": certificate.total if math.isfinite(certificate.total) else "inf",
        "norm": certificate.norm,
        "input_radius": certificate.limit,
    }
    for name, value in expected.items():
        require(
            record.get(name) == value,
            f"export.json states {name}={record.get(name)!r}, the certificate {value!r}",
        )


def read_proof(content: dict[str, Any]) -> tuple[str, str, list[dict[str, Any]]]:
    """The signature, the tensor of its output, and the steps of a proof."""
    require(
        _is(content.get("schema"), _PROOF_SCHEMA),
        f"proof.json is no proof of schema {_PROOF_SCHEMA}",
    )
    signature, output, steps = (content.get(name) for name in ("signature", "output", "steps"))
    require(signature in ("certified", "serving_default"), "the proof is of no known signature")
    require(isinstance(output, str), "the proof states no output")
    require(isinstance(steps, list), "the proof has no steps")
    assert isinstance(signature, str) and isinstance(output, str) and isinstance(steps, list)
    for step in steps:
        fits = (
            isinstance(step, dict)
            and all(isinstance(step.get(name), str) for name in ("kind", "layer", "output"))
            and all(isinstance(step.get(name), dict) for name in ("parameters", "arrays"))
            and all(
                isinstance(step.get(name), list) and all(isinstance(one, str) for one in step[name])
                for name in ("inputs", "masks")
            )
        )
        require(fits, "a step of the proof is incomplete")
    return signature, output, steps


def _pairs(rows: Any) -> list[list[float]]:
    require(
        isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == len(rows) for row in rows),
        "the pairwise constants are no square matrix",
    )
    return [[_number(value, "a pairwise constant") for value in row] for row in rows]


def _number(value: Any, name: str, least: float = 0.0) -> float:
    if value in ("inf", "-inf"):
        value = float(value)
    require(type(value) in (int, float), f"{name} of the certificate is {value!r}")
    require(value >= least, f"{name} of the certificate is {value!r}")
    return float(value)


def _is(value: Any, expected: Any) -> bool:
    """Equal, and not a boolean or float in place of an integer."""
    return type(value) is type(expected) and value == expected


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(entries)
    if len(content) < len(entries):
        raise ValueError("a name occurs twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
