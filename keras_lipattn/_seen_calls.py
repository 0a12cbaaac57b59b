"""What models without a graph are called on.

Keras keeps the shapes of the first argument of such a model (`get_build_config`), no dtypes, and
nothing about further arguments unless `build` takes their shapes.
"""

import weakref
from typing import Any

import keras

_SEEN: weakref.WeakKeyDictionary[keras.Model, tuple] = weakref.WeakKeyDictionary()


def specs_of(structure: Any) -> Any:
    """`KerasTensor`s of any batch size in place of arrays, tensors or specs of tensors."""

    def spec(leaf):
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        return keras.KerasTensor((None, *tuple(leaf.shape)[1:]), dtype=dtype)

    return keras.tree.map_structure(spec, structure)


def remember_call(model: keras.Model, *arguments: Any) -> None:
    """Remembers the positional arguments a model was called on, as specs, in place of earlier ones.

    Args:
        model: The model. What is remembered lives as long as it does, and is not saved with it.
        *arguments: Structures of arrays, tensors or specs of tensors.
    """
    _SEEN[model] = specs_of(arguments)


def remembered_call(model: keras.Model) -> tuple | None:
    """The positional arguments of the last call that was remembered, as specs, or `None`."""
    return _SEEN.get(model)
