"""Layers and models whose own code makes dot-product attention, with other attention inside."""

import functools
from typing import Any

import keras

from keras_lipattn.conversion._slots import attention_slots, exchange


@keras.saving.register_keras_serializable("keras_lipattn", "Converted")
class Converted:
    """What the class of a converted layer or model adds to its original class: saving and loading.

    The configuration of a layer that makes its attention itself, such as
    `keras_hub.layers.TransformerEncoder`, leads back to dot-product attention. That of a converted
    one holds it, and the attention layers to put inside by their places.
    """

    _slots: tuple[int, ...]

    def get_config(self) -> dict[str, Any]:
        """The configuration of the original, and places and configurations of its attention."""
        layer: Any = self
        attention = list(attention_slots(layer).values())
        converted = type(self)
        layer.__class__ = converted.__mro__[2]
        try:
            original = keras.saving.serialize_keras_object(layer)
        finally:
            layer.__class__ = converted
        # Compiled after the exchange, of which its optimizer must know.
        original.pop("compile_config", None)
        return {
            "original": original,
            "attention": [
                [place, keras.saving.serialize_keras_object(attention[place])]
                for place in self._slots
            ],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The converted layer, with new weights."""
        layer: Any = keras.saving.deserialize_keras_object(config["original"])
        new = {
            place: keras.saving.deserialize_keras_object(attention)
            for place, attention in config["attention"]
        }
        if len(attention_slots(layer)) <= max(new):
            _build_inside(layer)
        old = list(attention_slots(layer).values())
        if len(old) <= max(new):
            raise ValueError(
                f"{type(layer).__name__} {layer.name!r} does not have the attention layers that "
                f"were converted. Received: {len(old)} of them, the converted ones {sorted(new)}"
            )
        # Where a configuration holds the layers inside, they are converted already.
        exchange(
            layer,
            {
                id(old[place]): new[place]
                for place in new
                if type(old[place]) is keras.layers.MultiHeadAttention
            },
        )
        return as_converted(layer, tuple(new))


def _build_inside(layer: Any) -> None:
    """Builds what is inside of a layer without `build`, which Keras leaves to the first call."""
    shapes = layer.get_build_config() or {}
    if "shapes_dict" in shapes:
        layer._build_by_run_for_kwargs(shapes["shapes_dict"])
    elif "input_shape" in shapes:
        layer._build_by_run_for_single_pos_arg(shapes["input_shape"])


def as_converted(layer: Any, slots: tuple[int, ...]) -> Any:
    """Gives `layer` the class of a converted one.

    Args:
        layer: A layer whose attention was exchanged.
        slots: Where, counting its attention layers.

    Returns:
        The same layer.
    """
    if isinstance(layer, Converted):
        slots = tuple(sorted({*layer._slots, *slots}))
    else:
        layer.__class__ = _class_of_converted(type(layer))
    vars(layer)["_slots"] = slots
    return layer


@functools.cache
def _class_of_converted(original: type) -> type:
    names = {"__module__": original.__module__, "__doc__": original.__doc__}
    converted = type(original.__name__, (Converted, original), names)
    # Saved under the name of `Converted`, with which loading begins.
    for one in (converted, Converted):
        keras.saving.register_keras_serializable("keras_lipattn", "Converted")(one)
    return converted
