"""The content of a certificate: as JSON, its hash, and the values that it may have."""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from typing import Any

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.certification.classifier_head import MOST_PAIRED_CLASSES
from keras_lipattn.linalg import SAFETY

# Entries of the JSON that are computed from the others.
DERIVED = ("schema", "vacuous", "reasons", "proposals")
_HEADS = ("", "softmax", "sigmoid", "logits", "logit", "token logits")
_MASKS = (None, "full", "causal", "any", "given")
_SHA_256 = re.compile(r"[0-9a-f]{64}")
# Relative tolerance between a total and its logarithm, which are rounded separately.
_ROUNDING = 1e-9


def encode(value: Any) -> Any:
    """The value with lists for tuples and strings for infinite numbers."""
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def hash_of_content(certificate: Any) -> str:
    """SHA-256 of a certificate: of its canonical JSON without `content_hash`.

    The canonical JSON has sorted keys, no spaces, ASCII only, and none of the entries that are
    computed from others (`DERIVED`).
    """
    content = dataclasses.asdict(certificate)
    del content["content_hash"]
    # A field may hold anything after `dataclasses.replace`; then the hash only has to differ.
    text = json.dumps(encode(content), sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: str, schema: int) -> dict[str, Any]:
    """The entries of a certificate in JSON, without the derived ones.

    Raises:
        ValueError: if the text is not the JSON of a certificate of this schema.
    """
    if not isinstance(text, str | bytes | bytearray):
        raise ValueError(f"A certificate is read from a string of JSON. Received: {text!r}")
    try:
        content = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("The text is not a certificate: it is nested too deeply.") from None
    found = content.get("schema") if isinstance(content, dict) else None
    if type(found) is not int or found != schema:
        raise ValueError(
            f"The text must be a certificate of schema {schema}. Received: schema={found!r}"
        )
    return {key: value for key, value in content.items() if key not in DERIVED}


def decode(kind: Any, value: Any, name: str) -> Any:
    """The value that `encode` wrote for this type; `name` is for errors."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(
                f"The {name} of a certificate has no such entries. Received: {unknown}"
            )
        missing = sorted(set(hints) - set(value))
        if missing:
            raise ValueError(f"The {name} is incomplete. Received: nothing for {missing}")
        return kind(**{key: decode(hints[key], item, key) for key, item in value.items()})
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        if len(parts) == len(value):
            return tuple(decode(part, item, name) for part, item in zip(parts, value, strict=True))
    elif isinstance(kind, types.UnionType):
        return None if value is None else decode(parts[0], value, name)
    elif kind is float and (type(value) in (int, float) or value in ("inf", "-inf")):
        try:
            return float(value)
        except OverflowError:
            pass
    elif type(value) is kind:
        return value
    raise ValueError(
        f"The entry {name!r} of a certificate must be of type {getattr(kind, '__name__', kind)}. "
        f"Received: {name}={value!r}"
    )


def check_values(certificate: Any) -> None:
    """Raise a `ValueError` unless every entry is in its range and agrees with the others."""
    threat = certificate.threat_model
    _check(threat.norm in NORMS, f"norm must be one of {tuple(NORMS)}", threat.norm)
    for name in ("total", "published_total"):
        total = getattr(certificate, name)
        log10 = getattr(certificate, name.replace("total", "log10") if "_" in name else "log10")
        _check(total >= 0.0, f"{name} must be at least 0", total)
        agree = not math.isnan(log10) and math.isclose(
            total, _power_of_ten(log10), rel_tol=_ROUNDING, abs_tol=1e-322
        )
        _check(agree, f"{name} must be 10 to the power of its logarithm", (total, log10))
    _check(threat.input_radius > 0.0, "input_radius must be positive", threat.input_radius)
    _check(threat.radius >= 0.0, "radius must be at least 0", threat.radius)
    _check(
        bool(threat.center) == math.isfinite(threat.radius),
        "only local certificates have a center and a finite radius",
        (threat.center, threat.radius),
    )
    _check_size("max_tokens", threat.max_tokens)
    for shape in threat.shapes:
        for size in shape:
            _check_size("shapes", size)
    _check(threat.mask in _MASKS, f"mask must be one of {_MASKS}", threat.mask)
    for row in certificate.rows:
        for name in ("constant", "published", "radius"):
            value = getattr(row, name)
            _check(value >= 0.0, f"{name} of row {row.path!r} must be at least 0", value)
        _check(not math.isnan(row.cost), f"cost of row {row.path!r} must be a number", row.cost)
        _check_size(f"tokens of row {row.path!r}", row.tokens)
    paths = [row.path for row in certificate.rows]
    _check(len(set(paths)) == len(paths), "paths of rows must differ", paths)
    _check(certificate.head in _HEADS, f"head must be one of {_HEADS}", certificate.head)
    _check_pairs(certificate)
    for name in ("fingerprint", "content_hash"):
        value = getattr(certificate, name)
        _check(bool(_SHA_256.fullmatch(value)), f"{name} must be 64 hexadecimal digits", value)


def _check_pairs(certificate: Any) -> None:
    pairs = certificate.pairwise_constants
    if not pairs:
        return
    _check(
        certificate.head in ("softmax", "logits"),
        "only models with one vector of logits have pairwise_constants",
        certificate.head,
    )
    classes = len(pairs)
    _check(
        2 <= classes <= MOST_PAIRED_CLASSES and all(len(row) == classes for row in pairs),
        f"pairwise_constants must be a square matrix of 2 to {MOST_PAIRED_CLASSES} classes",
        [len(row) for row in pairs],
    )
    # Two equal columns of the last kernel have the constant 0.
    most = certificate.total * (2.0 if certificate.norm == "linf" else SAFETY * math.sqrt(2.0))
    for own, row in enumerate(pairs):
        for other, value in enumerate(row):
            fits = value == 0.0 if own == other else 0.0 <= value <= most * (1.0 + _ROUNDING)
            _check(
                fits and value == pairs[other][own],
                "pairwise_constants must be symmetric, 0 on the diagonal, and at most that of the "
                "total",
                f"{value} for classes {own} and {other}",
            )


def _check_size(name: str, size: int | None) -> None:
    _check(size is None or size >= 0, f"{name} must be a size", size)


def _check(condition: bool, rule: str, received: Any) -> None:
    if not condition:
        raise ValueError(f"In a certificate, {rule}. Received: {received!r}")


def _power_of_ten(log10: float) -> float:
    log = log10 * math.log(10.0)
    return math.exp(log) if log < 709.7 else math.inf


def _refuse(constant: str) -> None:
    raise ValueError(f"Numbers of a certificate must be finite JSON numbers. Received: {constant}")


def _without_repetition(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(entries)
    if len(content) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"An entry of a certificate must occur once. Received: {names}")
    return content
