"""The layers that a monitor watches, their certified bounds and their lower bounds."""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import describe
from keras_lipattn.certification import Certificate, CertificateRow, certify
from keras_lipattn.certification.keras_models import sibling_names
from keras_lipattn.estimation import estimate_lipschitz
from keras_lipattn.estimation.derivatives import preserve_losses
from keras_lipattn.layers import L2MultiHeadAttention, condensed
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer

# Enough to see the gap to the certified bound change; `estimate_lipschitz` takes more by default.
LOWER_BOUND_STEPS = 8

_Calls = list[tuple[LipschitzLayer, Any, dict[str, Any]]]


# Layers -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class WatchedLayer:
    """A layer with a Lipschitz constant, somewhere in a model.

    Attributes:
        layer: The layer.
        paths: Names from the model down to the layer, joined by "/", as in certificates. Layers
            with the same name in the same place are numbered: the second has "#2". More than one
            path when the layer is part of several models or layers.
        key: Identifier of the layer in log keys.
    """

    layer: LipschitzLayer
    paths: tuple[str, ...]
    key: str

    @property
    def path(self) -> str:
        return self.paths[0]


def watched_layers(model: keras.Model) -> list[WatchedLayer]:
    """Lipschitz layers of `model` at any depth, each once, in order, with unique keys.

    `layer.path` of Keras is not unique: a model that was built before it became part of another
    one keeps its old paths, so two nested models may hold layers with the same path.
    """
    found: dict[int, tuple[LipschitzLayer, list[str]]] = {}
    _collect(model, "", (model,), found)
    # The key of the whole model.
    keys = {"total"}
    watched = []
    for layer, paths in found.values():
        key = _unique(re.sub(r"[^0-9A-Za-z_]", "_", paths[0]), keys)
        keys.add(key)
        watched.append(WatchedLayer(layer, tuple(paths), key))
    return watched


def _collect(
    parent: keras.layers.Layer,
    prefix: str,
    ancestors: tuple[keras.layers.Layer, ...],
    found: dict[int, tuple[LipschitzLayer, list[str]]],
) -> None:
    names = sibling_names(parent)
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        path = prefix + names[id(layer)]
        if isinstance(layer, LipschitzLayer):
            found.setdefault(id(layer), (layer, []))[1].append(path)
        elif not any(layer is ancestor for ancestor in ancestors):
            _collect(layer, f"{path}/", (*ancestors, layer), found)


def _unique(key: str, taken: set[str]) -> str:
    candidate, count = key, 1
    while candidate in taken:
        count += 1
        candidate = f"{key}_{count}"
    return candidate


# Certified bounds ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """Largest certified constant over the calls of a layer."""

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
    """Certificate of `model`, and the bound of each watched layer as the model calls it.

    Args:
        model: A built model.
        watched: Its `WatchedLayer`s.
        norm: Norm of the certificate.
        sequence_length: Number of tokens, if the inputs of the model do not determine it.
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
            # Part of a layer that the certificate treats as a whole: its mask is unknown.
            mask = options.get("mask") or "any"
            bound = entry.layer.lipschitz(sequence_length, norm=norm, mask=mask)
            bounds[entry.key] = LayerBound(bound.value, bound.reason, sequence_length)
    return certificate, bounds


def finite_or_inf(value: Any) -> float:
    """`value` as a float for logs, with `inf` in place of NaN."""
    value = float(value)
    return math.inf if math.isnan(value) else value


def warn_of_infinite_layers(
    infinite: dict[str, str], bounds: Sequence[tuple[WatchedLayer, float, str]], when: str
) -> None:
    """Warns of layers that have just lost their finite bound, and records them.

    Args:
        infinite: Maps paths of layers without a finite bound to when and why it was lost.
        bounds: Triples of a layer, its bound and a reason if the bound is infinite.
        when: Epoch or batch, for the message.
    """
    lost = [
        (entry.path, reason)
        for entry, value, reason in bounds
        if math.isinf(value) and entry.path not in infinite
    ]
    if not lost:
        return
    infinite |= {path: f"from {when} on: {reason}" for path, reason in lost}
    (first, reason), *others = lost
    also = f" (also: {', '.join(path for path, _ in others)})" if others else ""
    warnings.warn(
        f"Layer {first!r} has no finite Lipschitz bound from {when} on{also}: {reason}",
        stacklevel=2,
    )


def warn_of_infinite_total(infinite: dict[str, str], certificate: Certificate, when: str) -> None:
    """Warns if a model has just lost its finite bound, and records the layers that are the cause.

    Args:
        infinite: As for `warn_of_infinite_layers`.
        certificate: The certificate of the model.
        when: Epoch, for the message.
    """
    # Not if a Lipschitz layer is the cause: that was reported.
    if certificate.is_finite or infinite:
        return
    reasons = {row.path: row.reason for row in certificate.rows if not row.is_finite}
    # A product of finite constants may overflow.
    reasons = reasons or {certificate.model: "; ".join(certificate.reasons)}
    infinite |= {path: f"from {when} on: {reason}" for path, reason in reasons.items()}
    warnings.warn(
        f"The model has no finite certified Lipschitz bound from {when} on: "
        f"{'; '.join(certificate.reasons)}",
        stacklevel=2,
    )


# Lower bounds -------------------------------------------------------------------------------------


def check_lower_bound_data(data: Any, model: keras.Model | None = None) -> None:
    """Raises a `ValueError` unless `data` is a batch of inputs that `model`, if given, accepts."""
    leaves = keras.tree.flatten(data)
    received = f"Received: {[describe(leaf) for leaf in leaves]}"
    if not leaves or not all(np.ndim(leaf) and np.shape(leaf)[0] for leaf in leaves):
        raise ValueError(
            "`lower_bound_data` must be a batch of inputs of the model, with at least one example. "
            f"{received}"
        )
    if model is not None:
        try:
            _recorded_calls(model, [], data)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`lower_bound_data` must be a batch of inputs that the model accepts: {error} "
                f"{received}"
            ) from error


def lower_bounds(
    model: keras.Model, watched: Sequence[WatchedLayer], data: Any, norm: str
) -> dict[str, float]:
    """Lower bounds of the model and its watched layers, measured by attacks from some inputs.

    Runs on the host, on plain tensors: under a distribution strategy it needs no other replica.

    Args:
        model: A built model.
        watched: Its `WatchedLayer`s.
        data: A batch of inputs of the model, in the structure of its call.
        norm: Norm of the bounds.

    Returns:
        A dictionary from `"total"` and the keys of the layers to floats. 0 where nothing can be
        measured: an output that is not one floating tensor, integer inputs, a layer that did not
        run.
    """
    values = dict.fromkeys(["total", *(entry.key for entry in watched)], 0.0)
    keys = {id(entry.layer): entry.key for entry in watched}
    layers = [entry.layer for entry in watched]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if not layer.is_condensed:
                # Caps become constants, so the search does not differentiate their norms.
                stack.enter_context(condensed(layer))
        for layer, x, kwargs in _recorded_calls(model, layers, data):
            key = keys[id(layer)]
            values[key] = max(values[key], _lower_bound(layer, x, norm, kwargs))
        if len(keras.tree.flatten(data)) == 1:
            values["total"] = _lower_bound(model, keras.tree.flatten(data)[0], norm, {})
    return values


def _lower_bound(function: Any, x: Any, norm: str, kwargs: dict[str, Any]) -> float:
    x = ops.convert_to_numpy(ops.convert_to_tensor(x))
    if x.dtype.kind not in "fV":
        return 0.0
    try:
        found = estimate_lipschitz(
            function,
            # bfloat16 has kind "V" in numpy.
            x if x.dtype.kind == "f" else x.astype(np.float32),
            norm,
            steps=LOWER_BOUND_STEPS,
            restarts=1,
            call_kwargs=kwargs,
        )
    except ValueError:
        # The outputs or derivatives are not finite, or the output is not one tensor.
        return 0.0
    return found.value if math.isfinite(found.value) else 0.0


def _recorded_calls(model: keras.Model, layers: Sequence[LipschitzLayer], data: Any) -> _Calls:
    """Calls of the layers when the model is called on `data`: layer, input, further arguments."""
    calls: _Calls = []
    with _recording(layers, calls), preserve_losses(model), keras.StatelessScope():
        model(keras.tree.map_structure(ops.convert_to_tensor, data), training=False)
    return calls


@contextlib.contextmanager
def _recording(layers: Sequence[LipschitzLayer], calls: _Calls) -> Iterator[None]:
    def record(layer, call):
        def recording(x, *args, **kwargs):
            if not args:
                given = {k: v for k, v in kwargs.items() if v is not None and k != "training"}
                mask = getattr(x, "_keras_mask", None)
                if mask is not None and isinstance(layer, L2MultiHeadAttention):
                    # The mask is attached to the tensor, which the search replaces.
                    given.setdefault("query_mask", mask)
                calls.append((layer, x, given))
            return call(x, *args, **kwargs)

        return recording

    attributes: list[dict[str, Any]] = [layer.__dict__ for layer in layers]
    for layer, own in zip(layers, attributes, strict=True):
        # Bypasses the attribute tracking of Keras.
        own["call"] = record(layer, layer.call)
    try:
        yield
    finally:
        for own in attributes:
            del own["call"]
