"""The layers of a model which a monitor watches, and the log keys they go by."""

import dataclasses
import re

import keras

from keras_lipattn.certification.keras_models import sibling_names
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer


@dataclasses.dataclass(frozen=True, eq=False)
class WatchedLayer:
    """A layer of ours somewhere in a model.

    Attributes:
        layer: The layer.
        paths: The names on the way from the model to the layer, joined by "/", as in certificates:
            of layers of one name in one place, the second has "#2". More than one path when the
            layer is part of several models or layers.
        key: The identifier which stands for the layer in log keys.
    """

    layer: LipschitzLayer
    paths: tuple[str, ...]
    key: str

    @property
    def path(self) -> str:
        return self.paths[0]


def watched_layers(model: keras.Model) -> list[WatchedLayer]:
    """The layers of ours in `model`, at any depth, each once, in order, under different keys.

    `layer.path` of Keras would not do: a model built before it was put into another one keeps the
    paths it had alone, so that two nested models may hold layers of the same path.
    """
    found: dict[int, tuple[LipschitzLayer, list[str]]] = {}
    _collect(model, "", (model,), found)
    # Taken by the total of the model.
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
