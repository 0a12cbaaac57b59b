"""Reading graphs of Keras without changing them.

The only module that looks at the private side of Keras: the nodes which a layer keeps about
its symbolic calls.
"""

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.keras_tensor import KerasTensor
from keras.src.models.functional import Functional

from keras_lipattn.certify.tensor_state import TensorState

# What code written for data may raise when it is called on symbols.
TRACE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TraceError(Exception):
    """A layer could not be called symbolically. The message says why."""


def function_of(model: keras.Model) -> keras.Function | None:
    """The graph of a Functional or Sequential model, `None` for any other."""
    if isinstance(model, keras.Sequential):
        return model._functional if type(model).call is keras.Sequential.call else None
    return model if type(model).call is Functional.call else None


def nodes_in_order(function: keras.Function) -> list[Any]:
    """The calls of a graph, each after those it depends on, without the inputs."""
    by_depth = function._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if node.operation and not node.is_input
    ]


def arguments_of(node: Any, states: dict[int, Any]) -> tuple[Any, Any]:
    """Arguments of a call with `states[id(tensor)]` in place of every symbolic tensor."""

    def fill(leaf):
        return states[id(leaf)] if isinstance(leaf, KerasTensor) else leaf

    arguments = node.arguments
    return (
        keras.tree.map_structure(fill, arguments.args),
        keras.tree.map_structure(fill, arguments.kwargs),
    )


def symbol(state: TensorState, *, largest: bool = False) -> KerasTensor:
    """A fresh symbolic tensor of the shape of `state`, with an unknown batch axis."""
    sizes = [
        None if varies and not largest else size
        for size, varies in zip(state.shape, state.dynamic, strict=True)
    ]
    return KerasTensor(shape=(None, *sizes), dtype=state.dtype)


def infer_shapes(operation: Any, args: Any, kwargs: Any, *, largest: bool) -> list[tuple]:
    """Shapes of the outputs of a call, without the batch axis.

    Raises:
        TraceError: if Keras cannot infer them.
    """

    def fill(leaf):
        return symbol(leaf, largest=largest) if isinstance(leaf, TensorState) else leaf

    args, kwargs = (keras.tree.map_structure(fill, part) for part in (args, kwargs))
    try:
        spec = operation.compute_output_spec(*args, **kwargs)
    except TRACE_ERRORS as error:
        raise TraceError(f"the shape of its output is not known ({_first_line(error)})") from error
    return [tuple(leaf.shape[1:]) for leaf in keras.tree.flatten(spec)]


def trace(
    layer: keras.layers.Layer,
    args: Any,
    kwargs: Any,
    mask_of: Callable[[TensorState], TensorState],
) -> tuple[keras.Function, list[TensorState]]:
    """Calls a layer symbolically and returns the graph of what it does at inference.

    The layers inside keep no trace of the call.

    Args:
        layer: a built layer.
        args: positional arguments, with a `TensorState` for every tensor.
        kwargs: keyword arguments, likewise.
        mask_of: from the state of a tensor that carries a mask to the state of the mask.

    Returns:
        The graph, and the states that belong to its inputs in order.

    Raises:
        TraceError: if the layer cannot be called on symbols, or changes its state when called.
    """
    states: list[TensorState] = []
    symbols: list[Any] = []

    def add(state):
        states.append(state)
        symbols.append(keras.Input(batch_shape=symbol(state).shape, dtype=state.dtype))

    def fill(leaf):
        if not isinstance(leaf, TensorState):
            return leaf
        if leaf not in states:
            add(leaf)
            if leaf.masked:
                tensor = symbols[-1]
                add(mask_of(leaf))
                backend.set_keras_mask(tensor, symbols[-1])
        return symbols[states.index(leaf)]

    args, kwargs = (keras.tree.map_structure(fill, part) for part in (args, kwargs))
    if getattr(layer, "_call_has_training_arg", False):
        kwargs["training"] = False
    if getattr(layer, "_call_has_mask_arg", False) and kwargs.get("mask") is None:
        kwargs["mask"] = keras.tree.map_structure(backend.get_keras_mask, args[0])
    with _untouched(layer), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scope = keras.StatelessScope(collect_losses=True)
        try:
            # Constants that the layer makes of its weights must have the precision they run with.
            with scope, backend.AutocastScope(layer.compute_dtype):
                outputs = layer.call(*args, **kwargs)
            # The graph holds its nodes itself, so the layers need not.
            function = keras.Function(symbols, outputs)
        except TRACE_ERRORS as error:
            raise TraceError(
                f"it cannot be called on symbolic tensors ({_first_line(error)})"
            ) from error
        if scope.state_mapping:
            raise TraceError("it changes its state or draws random numbers at inference")
    return function, states


@contextlib.contextmanager
def _untouched(layer: keras.layers.Layer) -> Iterator[None]:
    """Puts back whatever a symbolic call leaves behind on a layer and the layers inside it."""
    layers = layer._flatten_layers()
    attributes = [dict(vars(inner)) for inner in layers]
    lists = [
        (kept, list(kept))
        for inner in layers
        for kept in (inner._inbound_nodes, inner._outbound_nodes, inner._losses)
    ]
    loss_ids = [(inner._loss_ids, set(inner._loss_ids)) for inner in layers]
    names: set[str] = set()
    for index, inner in enumerate(layers):
        if not inner.built:
            vars(inner)["build"] = _refuse_to_build(inner)
        # Keras refuses graphs with two layers of one name, which a subclassed model may have.
        if inner.name in names:
            vars(inner)["name"] = f"{inner.name}#{index}"
        names.add(inner.name)
    try:
        yield
    finally:
        for inner, before in zip(layers, attributes, strict=True):
            now = vars(inner)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        for kept, before in lists:
            kept[:] = before
        for kept, before in loss_ids:
            kept.clear()
            kept.update(before)


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """Puts back the counters which number the names that Keras makes up."""
    counters: Any = global_state.get_global_attribute(
        "object_name_uids", collections.defaultdict(int), set_to_default=True
    )
    before = dict(counters)
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)


def _refuse_to_build(layer: keras.layers.Layer):
    def build(*args, **kwargs):
        raise ValueError(f"layer {layer.name!r} inside it is not built")

    return build


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def input_names(function: keras.Function) -> list[str]:
    """Names of the inputs of a graph, in order."""
    names = []
    for tensor in function.inputs:
        operation = tensor._keras_history.operation
        names.append(tensor.name if operation is None else operation.name)
    return names


def input_keys(function: keras.Function) -> list[str]:
    """Keys of the inputs of a graph that takes a dictionary, in the order of the inputs.

    Those of any other graph are the names of its inputs.
    """
    structure = function._inputs_struct
    if not isinstance(structure, dict) or len(structure) != len(function.inputs):
        return input_names(function)
    keys = {id(tensor): key for key, tensor in structure.items()}
    return [keys[id(tensor)] for tensor in function.inputs]


def call_arguments(model: keras.Model, inputs: Any) -> tuple:
    """Symbolic tensors, arrays or specs of what a subclassed model is called on.

    Raises:
        ValueError: if nothing is known about it.
    """
    if inputs is not None:
        return inputs if isinstance(inputs, tuple) else (inputs,)
    config = model.get_build_config() or {}
    shapes = config.get("shapes_dict") or config
    arguments = []
    for name, shape in shapes.items():
        if name.endswith("shape") and shape is not None:
            arguments.append(
                keras.tree.map_shape_structure(
                    lambda sizes: KerasTensor((None, *sizes[1:]), dtype=model.input_dtype), shape
                )
            )
    if not arguments:
        raise ValueError(
            "The shape that the model is called on is not known: pass `inputs`. "
            f"Received: inputs={inputs}"
        )
    return tuple(arguments)
