"""The graph of a Keras model, its inputs and the names of its layers."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import KerasTensor
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional

from keras_lipattn._seen_calls import remembered_call, specs_of


def function_of(model: keras.Model) -> keras.Function | None:
    """The graph of a Functional or Sequential model, `None` for any other."""
    if isinstance(model, keras.Sequential):
        return model._functional if type(model).call is keras.Sequential.call else None
    return model if type(model).call is Functional.call else None


def input_names(function: keras.Function) -> list[str]:
    """Names of the inputs of a graph, in order."""
    names = []
    for tensor in function.inputs:
        operation = tensor._keras_history.operation
        names.append(tensor.name if operation is None else operation.name)
    return names


def input_keys(function: keras.Function) -> list[str]:
    """Keys of the inputs of a graph that takes a dictionary, in the order of the inputs.

    For any other graph, the names of its inputs.
    """
    structure = function._inputs_struct
    if not isinstance(structure, dict) or len(structure) != len(function.inputs):
        return input_names(function)
    keys = {id(tensor): key for key, tensor in structure.items()}
    return [keys[id(tensor)] for tensor in function.inputs]


def call_specs(model: keras.Model, inputs: Any = None) -> tuple[tuple, list[str]]:
    """The arguments that a model is called on.

    Args:
        model: a built model.
        inputs: for models without a graph, arrays or `KerasTensor`s in the structure of the call; a
            tuple holds the positional arguments.

    Returns:
        Positional arguments, with a `KerasTensor` for every tensor and `None` for the batch axis;
        and the names of the tensors, in flat order.

    Raises:
        ValueError: if the arguments are not known.
    """
    function = function_of(model)
    if function is not None:
        return (function._inputs_struct,), input_names(function)
    if inputs is not None:
        arguments = specs_of(inputs if isinstance(inputs, tuple) else (inputs,))
    else:
        arguments = remembered_call(model) or _built_specs(model)
    names = [
        f"input {index} of shape {tuple(leaf.shape[1:])}"
        for index, leaf in enumerate(keras.tree.flatten(arguments), start=1)
    ]
    return arguments, names


def _built_specs(model: keras.Model) -> tuple:
    """Inputs of the shapes that a model without a graph was built with, in its own dtype."""
    config = model.get_build_config() or {}
    shapes = config.get("shapes_dict") or config
    arguments = tuple(
        keras.tree.map_shape_structure(
            lambda sizes: KerasTensor((None, *sizes[1:]), dtype=model.input_dtype), shape
        )
        for name, shape in shapes.items()
        if name.endswith("shape") and shape is not None
    )
    if not arguments:
        raise ValueError(
            "The input shape of the model is not known: pass `inputs`. Received: inputs=None"
        )
    return arguments


def nodes_in_order(function: keras.Function) -> list[Any]:
    """The calls recorded in a graph, each after the calls it depends on, without the inputs."""
    by_depth = function._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if node.operation and not node.is_input
    ]


def recorded_operations(model: keras.Model) -> dict[int, Any]:
    """Operations in the graphs of a model and of its inner models, by `id`."""
    graphs = [
        function_of(layer) for layer in model._flatten_layers() if isinstance(layer, keras.Model)
    ]
    return {id(op): op for graph in graphs if graph is not None for op in graph._operations}


def augments(layer: keras.layers.Layer) -> bool:
    """Whether `training` of a layer is true by default, as for image augmentation."""
    default = layer._call_signature.parameters.get("training")
    return default is not None and default.default is True


_RESIZES = (
    keras.layers.CenterCrop,
    keras.layers.Resizing,
    keras.layers.UpSampling2D,
    keras.src.ops.image.Resize,
)


def interpolates(operation: Any) -> bool:
    """Whether an operation interpolates images, which TensorFlow does in float32 for any dtype."""
    method = getattr(operation, "interpolation", "bilinear")
    return isinstance(operation, _RESIZES) and method != "nearest"


def sibling_names(parent: keras.layers.Layer) -> dict[int, str]:
    """Unique names of the layers directly inside a model or layer, by `id`.

    A subclassed model may have several layers of the same name. From the second one on, in the
    order of Keras, they get "#2" and so on.

    Args:
        parent: a model or layer.

    Returns:
        A dictionary that maps `id(layer)` to a name.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        name, count = str(layer.name), 1
        while name in taken:
            count += 1
            name = f"{layer.name}#{count}"
        taken.add(name)
        names[id(layer)] = name
    return names


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """Restores the counters of the names that Keras generates, as a context manager."""
    counters: Any = global_state.get_global_attribute(
        "object_name_uids", collections.defaultdict(int), set_to_default=True
    )
    before = dict(counters)
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)
