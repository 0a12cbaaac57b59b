"""The batch on which an exported model is compared with the Keras model."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.export._ports import Port

_BATCH = 3
_LENGTH = 16


def example_arrays(batch: Any, ports: Sequence[Port]) -> list[np.ndarray]:
    """A batch given by the user as flat arrays, checked against the inputs of the model.

    It has the structure of the model's input, or is a dict by the served names of the inputs.

    Raises:
        ValueError: If structure, rank or sizes do not fit.
    """
    if isinstance(batch, Mapping) and {port.name for port in ports} == set(batch):
        batch = [batch[port.name] for port in ports]
    arrays = [np.asarray(keras.ops.convert_to_numpy(leaf)) for leaf in keras.tree.flatten(batch)]
    if len(arrays) != len(ports):
        raise ValueError(
            f"`example_batch` must hold the {len(ports)} inputs of the model. "
            f"Received: {len(arrays)} arrays"
        )
    rows = {array.shape[0] if array.ndim else 0 for array in arrays}
    for array, port in zip(arrays, ports, strict=True):
        fits = len(array.shape) == len(port.shape) and all(
            size is None or size == got for size, got in zip(port.shape, array.shape, strict=True)
        )
        if not fits or len(rows) > 1 or 0 in rows:
            raise ValueError(
                f"`example_batch` must hold examples of shape {port.shape} for input "
                f"{port.name!r}. Received: shape {array.shape}"
            )
    return arrays


def made_up_arrays(
    model: keras.Model,
    ports: Sequence[Port],
    *,
    sequence_length: int | None,
    input_radius: float | None,
) -> list[np.ndarray]:
    """A random batch for the inputs of a model.

    Raises:
        ValueError: If an input takes something other than numbers.
    """
    rng = np.random.default_rng(0)
    vocabulary = [
        layer.input_dim for layer in model._flatten_layers() if hasattr(layer, "input_dim")
    ]
    length = min(_LENGTH, sequence_length or _LENGTH)
    arrays = []
    for port in ports:
        shape = (_BATCH, *(length if size is None else size for size in port.shape[1:]))
        if port.floating:
            array = rng.normal(size=shape)
            if input_radius is not None:
                norms = np.linalg.norm(array, axis=-1, keepdims=True)
                array *= 0.5 * input_radius / np.maximum(norms, 1e-12)
        elif port.dtype == "bool":
            array = rng.random(shape) < 0.8
        elif port.dtype == "uint8":
            array = rng.integers(0, 256, shape)
        elif port.dtype.startswith(("int", "uint")):
            array = rng.integers(0, min(vocabulary, default=2), shape)
        else:
            raise ValueError(
                f"Give an `example_batch`: none can be made up for input {port.name!r}. "
                f"Received: dtype={port.dtype}"
            )
        arrays.append(array.astype("float32" if port.dtype == "bfloat16" else port.dtype))
    return arrays
