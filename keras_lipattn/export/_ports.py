"""Names, shapes and dtypes of what goes into and comes out of a served model."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import keras

# Names which Keras makes up follow a counter of the process; a served name must not.
_MADE_UP = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


@dataclasses.dataclass(frozen=True)
class Port:
    """One named input of a signature.

    Args:
        name: A Python identifier.
        shape: Sizes of all axes, the free batch axis first; `None` where they vary.
        dtype: Name of the dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def dynamic_axes(self) -> tuple[int, ...]:
        """Axes other than the batch whose size varies from request to request."""
        return tuple(axis for axis, size in enumerate(self.shape) if axis and size is None)

    @property
    def floating(self) -> bool:
        """Whether the entries are real numbers."""
        return "float" in self.dtype


def input_ports(structure: Any) -> list[Port]:
    """The inputs of a model, flat and in the order of `keras.tree.flatten`.

    Args:
        structure: Nested structure of `KerasTensor`, `keras.InputSpec` or tensors.

    Raises:
        ValueError: If a leaf has no batch axis, or no shape or dtype.
    """
    leaves = _named_leaves(structure, single="inputs", several="inputs")
    ports = []
    for name, leaf in leaves:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or len(shape) == 0:
            raise ValueError(
                "Every input of the model must have a shape, with the batch axis first, and a "
                f"dtype. Received: {leaf}"
            )
        ports.append(Port(name, (None, *tuple(shape)[1:]), keras.backend.standardize_dtype(dtype)))
    return ports


def output_names(structure: Any) -> list[str]:
    """Names of the outputs of a model, as Keras's own export gives them."""
    leaves = _named_leaves(structure, single="output_0", several="output", own_names=False)
    return [name for name, _ in leaves]


def _named_leaves(structure, *, single, several, own_names=True) -> list[tuple[str, Any]]:
    leaves = keras.tree.flatten_with_path(structure)
    named = []
    for index, (path, leaf) in enumerate(leaves):
        name = single if len(leaves) == 1 else f"{several}_{index}"
        given = getattr(leaf, "name", None) if own_names else None
        if path and isinstance(path[-1], str):
            name = "_".join(str(part) for part in path)
        elif given and not _MADE_UP.fullmatch(given):
            name = given
        named.append((name, leaf))
    return list(zip(_unique([name for name, _ in named]), [leaf for _, leaf in named], strict=True))


def _unique(names: Sequence[str]) -> list[str]:
    """The names as different identifiers."""
    taken: list[str] = []
    for name in names:
        identifier = re.sub(r"\W", "_", name)
        identifier = f"_{identifier}" if not identifier or identifier[0].isdigit() else identifier
        candidate, count = identifier, 1
        while candidate in taken:
            count += 1
            candidate = f"{identifier}_{count}"
        taken.append(candidate)
    return taken
