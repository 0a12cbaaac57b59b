"""Attention layers inside of a layer, and putting others in their places."""

from typing import Any

import keras
from keras.src.models.functional import Functional
from keras.src.ops.node import KerasHistory

from keras_lipattn.certification.keras_models import function_of, sibling_names
from keras_lipattn.layers import L2MultiHeadAttention

_ATTENTION = (keras.layers.MultiHeadAttention, L2MultiHeadAttention)


def attention_slots(root: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """Attention layers inside of `root`, dot-product or L2, each once: from their paths, in order.

    The order is the same in every layer that is made from the same configuration, while names that
    Keras makes up are not.
    """
    slots: dict[str, keras.layers.Layer] = {}
    seen: set[int] = set()

    def visit(parent, prefix):
        names = sibling_names(parent)
        for layer in parent._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = prefix + names[id(layer)]
            if isinstance(layer, _ATTENTION):
                slots[path] = layer
            else:
                visit(layer, f"{path}/")

    visit(root, "")
    return slots


def is_plain_graph(layer: Any) -> bool:
    """Whether the configuration of `layer` holds the layers inside as they are."""
    return type(layer) in (keras.Model, keras.Sequential, Functional) and (
        function_of(layer) is not None
    )


def exchange(root: keras.layers.Layer, new_of: dict[int, keras.layers.Layer]) -> None:
    """Puts layers in the places of others, wherever `root` or a layer inside of it keeps those.

    Args:
        root: A layer or model.
        new_of: From `id(old)` to the layer for its place.
    """
    olds: dict[int, Any] = {}
    for layer in root._flatten_layers():
        # A Sequential model keeps its layers a second time.
        for holder in (layer, getattr(layer, "_functional", None)):
            if holder is None:
                continue
            held = [inner for inner in holder._layers if id(inner) in new_of]
            olds |= {id(old): old for old in held}
            ids = holder._tracker.stored_ids["layers"]
            ids.difference_update(map(id, held))
            ids.update(id(new_of[id(old)]) for old in held)
            if held:
                _exchange_attributes(holder, new_of)
                _exchange_node_keys(holder, new_of)
    for key, old in olds.items():
        _take_calls(old, new_of[key])


def _exchange_attributes(holder: Any, new_of: dict[int, Any]) -> None:
    for name, value in list(vars(holder).items()):
        replaced = _exchanged(value, new_of)
        if replaced is not value:
            # By `setattr`: TensorFlow tracks attributes too.
            setattr(holder, name, replaced)


def _exchange_node_keys(holder: Any, new_of: dict[int, Any]) -> None:
    """A graph knows its nodes by the identity of their operation."""
    if isinstance(holder, keras.Function):
        keys = [key.split("_", 1) for key in holder._nodes]
        news = {str(old): str(id(new)) for old, new in new_of.items()}
        holder._nodes = {f"{news.get(one, one)}_{rest}" for one, rest in keys}


def _exchanged(value: Any, new_of: dict[int, Any]) -> Any:
    """`value` with layers exchanged: lists and dictionaries in place, others as new ones."""
    if id(value) in new_of:
        return new_of[id(value)]
    if isinstance(value, tuple) or type(value).__name__ == "ListWrapper":
        items = [_exchanged(item, new_of) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            # TensorFlow saves no list of its own in which an item was replaced.
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
    """Makes the calls of `old` in graphs calls of `new`."""
    for node in old._inbound_nodes:
        node.operation = new
        for tensor in node.outputs:
            _, *place = tensor._keras_history
            tensor._keras_history = KerasHistory(new, *place)
    for name in ("_inbound_nodes", "_outbound_nodes"):
        vars(new)[name] = getattr(old, name)
