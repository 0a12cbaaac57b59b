"""Certified bounds of a model and of its watched layers."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lipattn.callbacks._watched_layers import WatchedLayer
from keras_lipattn.certification import Certificate, CertificateRow, certify


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """The largest certified constant over the calls of a layer."""

    value: float
    reason: str
    tokens: int | None


def certified_bounds(
    model: keras.Model,
    watched: Sequence[WatchedLayer],
    *,
    norm: str,
    sequence_length: int | None,
    options: Mapping[str, Any],
) -> tuple[Certificate, dict[str, LayerBound]]:
    """The certificate of `model`, and the bound of each watched layer as it is called there.

    Args:
        model: A built model.
        watched: Its `WatchedLayer`s.
        norm: Norm of the certificate.
        sequence_length: Number of tokens where the inputs of the model leave it open.
        options: Further arguments of `certify`.

    Returns:
        A pair: the `Certificate`, and a dictionary from keys to `LayerBound`s.
    """
    certificate = certify(model, norm=norm, sequence_length=sequence_length, **options)
    rows: dict[str, list[CertificateRow]] = {}
    for row in certificate.rows:
        rows.setdefault(re.sub(r":call\d+$", "", row.path), []).append(row)
    bounds = {}
    for entry in watched:
        calls = [row for path in entry.paths for row in rows.get(path, [])]
        if calls:
            worst = max(calls, key=lambda row: row.constant)
            bounds[entry.key] = LayerBound(worst.constant, worst.reason, worst.tokens)
        else:
            # Inside something the certificate treats as a whole: nobody knows the mask it is called
            # with.
            mask = options.get("mask") or "any"
            bound = entry.layer.lipschitz(sequence_length, norm=norm, mask=mask)
            bounds[entry.key] = LayerBound(bound.value, bound.reason, sequence_length)
    return certificate, bounds


def finite_or_inf(value: Any) -> float:
    """`value` as a float for logs, where NaN does not count as a number."""
    value = float(value)
    return math.inf if math.isnan(value) else value
