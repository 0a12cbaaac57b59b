"""Attention layers inside a layer: finding and exchanging them, saving and loading the result."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.models.functional import Functional
from keras.src.ops.node import KerasHistory
from keras.src.ops.symbolic_arguments import SymbolicArguments

from keras_lipattn.certification.keras_models import function_of, sibling_names
from keras_lipattn.layers import BoundedMultiHeadAttention, L2MultiHeadAttention

_ATTENTION = (keras.layers.MultiHeadAttention, L2MultiHeadAttention, BoundedMultiHeadAttention)
# Where a layer is inside another: its index among the layers there, and so on inside of it.
Place = tuple[int, ...]


def attention_slots(root: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """Maps paths to the attention layers inside `root`, those of Keras and ours, each once."""
    layers = inner_layers(root, opens=lambda layer: not isinstance(layer, _ATTENTION))
    return {path: layer for path, layer in layers.items() if isinstance(layer, _ATTENTION)}


def inner_layers(
    root: keras.layers.Layer, opens: Callable[[Any], bool]
) -> dict[str, keras.layers.Layer]:
    """Maps paths to the layers inside `root`, each once.

    Layers made from the same configuration have them in the same order. The names that Keras
    generates differ.

    Args:
        root: A layer or model.
        opens: Whether to list the layers inside of a layer.
    """
    found: dict[str, keras.layers.Layer] = {}
    seen: set[int] = set()
    for path, layer in all_paths(root, opens):
        if id(layer) not in seen:
            seen.add(id(layer))
            found[path] = layer
    return found


def all_paths(
    root: keras.layers.Layer, opens: Callable[[Any], bool]
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """As `inner_layers`, with every path of a layer that is in several places."""

    def visit(parent, prefix, ancestors):
        names = sibling_names(parent)
        for layer in parent._flatten_layers(include_self=False, recursive=False):
            path = prefix + names[id(layer)]
            yield path, layer
            if opens(layer) and id(layer) not in ancestors:
                yield from visit(layer, f"{path}/", ancestors | {id(layer)})

    return visit(root, "", frozenset({id(root)}))


def places_of(root: keras.layers.Layer, layers: list[Any]) -> tuple[Place, ...]:
    """Places of some layers inside `root`, each once, in the order in which it holds them."""
    wanted = {id(layer) for layer in layers}
    places: list[Place] = []
    seen: set[int] = set()

    def visit(parent, place):
        for index, layer in enumerate(_children(parent)):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            if id(layer) in wanted:
                places.append((*place, index))
            else:
                visit(layer, (*place, index))

    visit(root, ())
    return tuple(places)


def at(root: Any, place: Place) -> Any:
    """The layer at a place, or `None` if `root` does not have it (yet)."""
    for index in place:
        children = _children(root)
        if index >= len(children):
            return None
        root = children[index]
    return root


def _children(parent: Any) -> list[Any]:
    """Layers directly inside a layer, the same before and after it is built."""
    layers = parent._flatten_layers(include_self=False, recursive=False)
    return [layer for layer in layers if not isinstance(layer, keras.layers.InputLayer)]


def is_plain_graph(layer: Any) -> bool:
    """Whether the configuration of `layer` contains those of the layers inside it."""
    return type(layer) in (keras.Model, keras.Sequential, Functional) and (
        function_of(layer) is not None
    )


def exchange(root: keras.layers.Layer, new_of: dict[int, keras.layers.Layer]) -> None:
    """Replaces layers wherever `root`, or a layer inside it, stores them.

    Args:
        root: A layer or model.
        new_of: Maps `id(old)` to the layer that replaces `old`.
    """
    olds: dict[int, Any] = {}
    for layer in root._flatten_layers():
        # A Sequential model stores its layers a second time.
        for holder in (layer, getattr(layer, "_functional", None)):
            if holder is None:
                continue
            found = [inner for inner in holder._layers if id(inner) in new_of]
            olds |= {id(old): old for old in found}
            ids = holder._tracker.stored_ids["layers"]
            ids.difference_update(map(id, found))
            ids.update(id(new_of[id(old)]) for old in found)
            if found:
                _exchange_attributes(holder, new_of)
                _exchange_node_keys(holder, new_of)
    for key, old in olds.items():
        _take_calls(old, new_of[key])


def _exchange_attributes(holder: Any, new_of: dict[int, Any]) -> None:
    for name, value in list(vars(holder).items()):
        replaced = _exchanged(value, new_of)
        if replaced is not value:
            # `setattr`, since TensorFlow tracks attributes too.
            setattr(holder, name, replaced)


def _exchange_node_keys(holder: Any, new_of: dict[int, Any]) -> None:
    """Updates the keys of the nodes of a graph, which contain the `id` of their operation."""
    if isinstance(holder, keras.Function):
        keys = [key.split("_", 1) for key in holder._nodes]
        news = {str(old): str(id(new)) for old, new in new_of.items()}
        holder._nodes = {f"{news.get(one, one)}_{rest}" for one, rest in keys}


def _exchanged(value: Any, new_of: dict[int, Any]) -> Any:
    """`value` with layers exchanged. Lists and dictionaries change in place, tuples are copied."""
    if id(value) in new_of:
        return new_of[id(value)]
    if isinstance(value, tuple) or type(value).__name__ == "ListWrapper":
        items = [_exchanged(item, new_of) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            # TensorFlow cannot save its own list type after an item was replaced.
            return items
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    items = enumerate(value) if isinstance(value, list) else ()
    items = value.items() if isinstance(value, dict) else items
    for place, item in list(items):
        replaced = _exchanged(item, new_of)
        if replaced is not item:
            value[place] = replaced
    return value


def _take_calls(old: Any, new: Any) -> None:
    """Turns the calls of `old` in graphs into calls of `new`."""
    for node in old._inbound_nodes:
        node.operation = new
        arguments = node.arguments
        if "mask" in arguments.kwargs and "mask" not in inspect.signature(new.call).parameters:
            # Keras passes masks to normalizations by keyword.
            others = {name: one for name, one in arguments.kwargs.items() if name != "mask"}
            node.arguments = SymbolicArguments(*arguments.args, **others)
        for tensor in node.outputs:
            _, *place = tensor._keras_history
            tensor._keras_history = KerasHistory(new, *place)
    for name in ("_inbound_nodes", "_outbound_nodes"):
        vars(new)[name] = getattr(old, name)


@keras.saving.register_keras_serializable("keras_lipattn", "Converted")
class Converted:
    """Mixin that saves and loads a layer or model in which layers were exchanged.

    A layer that creates its layers itself, such as `keras_hub.layers.TransformerEncoder`, would
    create the old ones again when it is loaded. The configuration of a converted layer contains the
    original configuration, and the new layers with their places and the classes of the old ones.
    """

    _exchanged_at: dict[Place, str]

    def get_config(self) -> dict[str, Any]:
        """The configuration of the original, with places and configurations of its new layers."""
        layer: Any = self
        converted = type(self)
        layer.__class__ = converted.__mro__[2]
        try:
            original = keras.saving.serialize_keras_object(layer)
        finally:
            layer.__class__ = converted
        # It is compiled after the exchange, so that the optimizer has the new weights.
        original.pop("compile_config", None)
        return {
            "original": original,
            "exchanged": [
                [list(place), old, keras.saving.serialize_keras_object(at(layer, place))]
                for place, old in self._exchanged_at.items()
            ],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The converted layer, with new weights."""
        layer: Any = keras.saving.deserialize_keras_object(config["original"])
        new = {
            tuple(place): (old, keras.saving.deserialize_keras_object(replacement))
            for place, old, replacement in config["exchanged"]
        }
        if any(at(layer, place) is None for place in new):
            _build_inside(layer)
        olds = {place: at(layer, place) for place in new}
        missing = [new[place][0] for place, old in olds.items() if old is None]
        if missing:
            raise ValueError(
                f"{type(layer).__name__} {layer.name!r} does not have the layers that were "
                f"converted. Received: a layer without {missing}"
            )
        # Layers inside that the configuration contains are converted already.
        exchange(
            layer,
            {
                id(olds[place]): replacement
                for place, (old, replacement) in new.items()
                if type(olds[place]).__name__ == old
            },
        )
        return as_converted(layer, {place: old for place, (old, _) in new.items()})


def _build_inside(layer: Any) -> None:
    """Builds the layers inside a layer without `build`, as Keras does in the first call."""
    shapes = layer.get_build_config() or {}
    if "shapes_dict" in shapes:
        layer._build_by_run_for_kwargs(shapes["shapes_dict"])
    elif "input_shape" in shapes:
        layer._build_by_run_for_single_pos_arg(shapes["input_shape"])


def as_converted(layer: Any, exchanged: dict[Place, str]) -> Any:
    """Changes the class of `layer` to one that derives from it and from `Converted`.

    Args:
        layer: A layer in which others were exchanged.
        exchanged: Maps their places to the names of the classes of the old layers.

    Returns:
        The same layer.
    """
    if isinstance(layer, Converted):
        # What was exchanged twice is still the first layer in the original configuration.
        exchanged = {**exchanged, **layer._exchanged_at}
    else:
        layer.__class__ = _class_of_converted(type(layer))
    vars(layer)["_exchanged_at"] = exchanged
    return layer


@functools.cache
def _class_of_converted(original: type) -> type:
    names = {"__module__": original.__module__, "__doc__": original.__doc__}
    converted = type(original.__name__, (Converted, original), names)
    # Saved under the name of `Converted`, whose `from_config` loads it.
    for one in (converted, Converted):
        keras.saving.register_keras_serializable("keras_lipattn", "Converted")(one)
    return converted
