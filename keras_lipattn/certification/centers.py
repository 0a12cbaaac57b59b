"""Reading the centers of local certificates."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.keras_models import function_of, input_keys


def check_ball(center: Any, radius: Any) -> None:
    """Raises a `ValueError` unless both or none are given and the radius is valid."""
    if (center is None) != (radius is None):
        raise ValueError(
            "`center` and `radius` must be given together. "
            f"Received: center {'missing' if center is None else 'given'}, radius={radius!r}"
        )
    if radius is not None and not (
        isinstance(radius, int | float | np.number)
        and not isinstance(radius, bool)
        and 0.0 <= float(radius) < math.inf
    ):
        raise ValueError(
            f"`radius` must be a finite nonnegative number. Received: radius={radius!r}"
        )


def examples_of(model: keras.Model, center: Any) -> tuple[Any, list[list[np.ndarray]]]:
    """The centers of the balls.

    Args:
        model: the model.
        center: its inputs, in the structure of the call: one example without a batch axis, or a
            batch.

    Returns:
        Arrays in the structure of the call, and for each example the flat list of its inputs,
        each of shape `(1, ...)`.

    Raises:
        ValueError: if they are not finite, or do not have the shapes that the model takes.
    """
    function = function_of(model)
    if function is not None and isinstance(center, dict):
        names = input_keys(function)
        if set(center) != set(names):
            raise ValueError(f"`center` must have the keys {names}. Received: {list(center)}")
        center = [center[name] for name in names]
    arrays = keras.tree.map_structure(lambda leaf: np.asarray(_numbers(leaf)), center)
    flat = keras.tree.flatten(arrays)
    shapes = _shapes(model, function, flat)
    if len(flat) != len(shapes):
        raise ValueError(
            f"`center` must have one array for each of the {len(shapes)} inputs of the model. "
            f"Received: {len(flat)} arrays"
        )
    batched = [_with_batch(array, shape) for array, shape in zip(flat, shapes, strict=True)]
    count = len(batched[0])
    if count == 0 or any(len(array) != count for array in batched):
        raise ValueError(
            "`center` must have at least one example, and the same number in every input. "
            f"Received: {[len(array) for array in batched]} examples"
        )
    structure = keras.tree.pack_sequence_as(arrays, batched)
    return structure, [[array[i : i + 1] for array in batched] for i in range(count)]


def describe(examples: Sequence[Sequence[np.ndarray]]) -> str:
    """A text that describes the centers: their number, shapes and a digest of their values."""
    digest = hashlib.sha256()
    for example in examples:
        for array in example:
            digest.update(f"{array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    shapes = " and ".join(str(tuple(array.shape[1:])) for array in examples[0])
    count = "1 input" if len(examples) == 1 else f"{len(examples)} inputs"
    return f"{count} of shape {shapes}, SHA-256 {digest.hexdigest()[:16]}"


def _numbers(leaf: Any) -> Any:
    if keras.ops.is_tensor(leaf) or isinstance(leaf, keras.Variable):
        return keras.ops.convert_to_numpy(leaf)
    return leaf


def _shapes(model, function, flat) -> list[tuple]:
    """Shapes that the inputs must have, the batch axis included."""
    if function is not None:
        return [tuple(tensor.shape) for tensor in function.inputs]
    config = model.get_build_config() or {}
    known = config.get("shapes_dict") or config
    leaves = [shape for name, shape in known.items() if name.endswith("shape") and shape]
    if len(leaves) == len(flat) and all(isinstance(shape, tuple | list) for shape in leaves):
        # The shapes that a subclassed model was built with, for any length.
        return [(None, *[None] * (len(shape) - 2), shape[-1]) for shape in leaves]
    return [(None, *array.shape[1:]) for array in flat]


def _with_batch(array: np.ndarray, shape: tuple) -> np.ndarray:
    sizes = array.shape if array.ndim == len(shape) else (None, *array.shape)
    fits = len(sizes) == len(shape) and all(
        wanted is None or size is None or wanted == size
        for size, wanted in zip(sizes[1:], shape[1:], strict=True)
    )
    if not fits or array.dtype.kind not in "fiub":
        raise ValueError(
            "`center` must hold one example of an input of the model, or a batch of them, of shape "
            f"{shape}. Received: an array of shape {array.shape} and dtype {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            "`center` must be finite. Received: an array with entries that are NaN or infinite"
        )
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
    return array if array.ndim == len(shape) else array[None]
