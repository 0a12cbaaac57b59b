"""Exchanging dot-product attention for L2 attention in a trained model."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification import tracing
from keras_lipattn.convert._tied_weights import matching_value, tied_query
from keras_lipattn.convert.conversion import Conversion
from keras_lipattn.layers import L2MultiHeadAttention


def convert_attention(model: keras.Model, x: Any = None) -> Conversion:
    """A copy of a model with L2 attention in place of every `keras.layers.MultiHeadAttention`.

    Dot-product attention has no Lipschitz constant, L2 attention has one, but not the same
    functions: its queries, keys and values are one projection. The weights of the copy are the
    closest that a head can have, a start for fine-tuning on data or on the outputs of the original.
    Before that the outputs may have little in common, as `relative_error` tells:

    - The query kernel imitates the symmetric part of `W_Q W_K^T` with no negative eigenvalues, and
      `-|y_j|^2` is added to the logits: tokens far from the origin attract less. The query and key
      biases are dropped.
    - The value kernel is a least-squares solution for `W_V W_O` of each head. Values are lost where
      they read directions which the head does not compare tokens by.
    - The output kernel is copied; the value bias goes to the output bias, exactly (but for dropout
      in training).
    - A token always sees itself, and rows of padded tokens are zero.

    All other layers, names, masks and states are copied bit for bit, and the model is compiled if
    the original is, with a new optimizer. Nested Functional and Sequential models are converted.

    Args:
        model: Functional or built Sequential model, left as it is.
        x: A batch of inputs to measure the error on, in the structure that `model` is called on.

    Returns:
        A `Conversion`: the new model, the names of replaced layers and the relative error on `x`.

    Raises:
        ValueError: If `model` is of another kind, or holds an attention layer that is used for
            cross-attention, has a gate, is quantised, is a subclass or lies inside another layer.

    Example:

    >>> conversion = keras_lipattn.convert_attention(model, x)
    >>> conversion.model.compile("adam", "mse")
    >>> conversion.model.fit(x, model.predict(x), epochs=10)
    >>> keras_lipattn.certification(conversion.model)
    """
    function = tracing.function_of(model) if isinstance(model, keras.Model) else None
    if function is None:
        raise ValueError(
            "`model` must be a Functional or built Sequential model, whose graph is known. "
            f"Received: model={model!r}"
        )
    replaced = dict.fromkeys(layer.name for layer in _convertible(function))
    copies: dict[int, Any] = {}
    layers: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy_of(operation):
        if id(operation) not in copies:
            copies[id(operation)] = _copy(operation, copy_of)
            inner = _inner(operation)
            if isinstance(operation, keras.layers.Layer) and inner is None:
                layers.append((operation, copies[id(operation)]))
        return copies[id(operation)]

    with tracing.names_kept():
        converted = copy_of(model)
    for old, new in layers:
        if isinstance(old, keras.layers.MultiHeadAttention):
            _imitate(old, new)
        else:
            _copy_state(old, new)
    return Conversion(
        model=converted,
        replaced=tuple(replaced),
        relative_error=None if x is None else _relative_error(model, converted, x),
    )


def _inner(operation: Any) -> keras.Function | None:
    return tracing.function_of(operation) if isinstance(operation, keras.Model) else None


def _convertible(function: keras.Function) -> Iterator[keras.layers.MultiHeadAttention]:
    """The attention layers of a graph, once per call, or an error that names what cannot be."""
    for node in tracing.nodes_in_order(function):
        operation = node.operation
        inner = _inner(operation)
        if inner is not None:
            yield from _convertible(inner)
        elif type(operation) is keras.layers.MultiHeadAttention:
            _check(operation, node.arguments)
            yield operation
        elif isinstance(operation, keras.layers.Layer):
            _check_free_of_attention(operation)


def _check(layer: keras.layers.MultiHeadAttention, arguments: Any) -> None:
    given = dict(zip(("query", "value", "key"), arguments.args, strict=False)) | arguments.kwargs
    query, value, key = given["query"], given["value"], given.get("key")
    if value is not query or (key is not None and key is not query):
        raise ValueError(
            f"Layer {layer.name!r} cannot be converted: it is used for cross-attention, for which "
            f"no Lipschitz bound exists. Received: query={query}, value={value}, key={key}"
        )
    if layer.get_config()["use_gate"]:
        raise ValueError(
            f"Layer {layer.name!r} cannot be converted: multiplying by a gate computed from the "
            "input has no Lipschitz bound. Received: use_gate=True"
        )
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense):
        if dense.quantization_mode is not None:
            raise ValueError(
                f"Layer {layer.name!r} cannot be converted: it is quantised. "
                f"Received: {dense.name!r} with dtype={dense.dtype_policy.name!r}"
            )


def _check_free_of_attention(layer: keras.layers.Layer) -> None:
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.layers.MultiHeadAttention):
            where = "it is a subclass" if inner is layer else f"it lies inside {layer.name!r}"
            raise ValueError(
                f"Layer {inner.name!r} cannot be converted: {where}, and what it is called with is "
                f"not known. Received: {type(layer).__name__} {layer.name!r}"
            )


def _copy(operation: Any, copy_of) -> Any:
    if _inner(operation) is not None:
        return _copy_graph(operation, copy_of)
    config = operation.get_config()
    if isinstance(operation, keras.layers.MultiHeadAttention):
        del config["use_gate"]
        return L2MultiHeadAttention.from_config(config)
    return type(operation).from_config(config)


def _copy_graph(model: keras.Model, copy_of) -> keras.Model:
    inputs = None
    if not isinstance(model, keras.Sequential):
        # Keras would name the copy of an input that has no name after a counter.
        inputs = keras.tree.map_structure(
            lambda tensor: copy_of(tensor._keras_history.operation).output, model.input
        )
    return keras.models.clone_model(model, input_tensors=inputs, clone_function=copy_of)


def _copy_state(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    if [variable.shape for variable in old.variables] != [
        variable.shape for variable in new.variables
    ]:
        raise ValueError(
            f"Layer {old.name!r} cannot be copied: `from_config(get_config())` makes a layer with "
            f"other weights. Received: {type(old).__name__}"
        )
    for source, target in zip(old.variables, new.variables, strict=True):
        target.assign(source)


def _imitate(old: keras.layers.MultiHeadAttention, new: Any) -> None:
    """Gives the new layer the weights which come closest to the old one."""

    def heads(dense):
        kernel = keras.ops.convert_to_numpy(dense.kernel).astype(np.float64)
        return kernel.transpose(1, 0, 2)

    tied = tied_query(heads(old.query_dense), heads(old.key_dense))
    value = matching_value(tied, heads(old.value_dense))
    new.query_kernel.assign(tied.transpose(1, 0, 2))
    new.value_kernel.assign(value.transpose(1, 0, 2))
    new.output_kernel.assign(old.output_dense.kernel)
    if old.use_bias:
        # The rows of the attention weights sum to one.
        constant = keras.ops.tensordot(old.value_dense.bias, old.output_dense.kernel, 2)
        new.output_bias.assign(old.output_dense.bias + constant)


def _relative_error(old: keras.Model, new: keras.Model, x: Any) -> float:
    before, after = (
        np.concatenate([_entries(leaf) for leaf in keras.tree.flatten(model(x, training=False))])
        for model in (old, new)
    )
    # Outputs of zeros have an error of 0 or of a huge number.
    return float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-300))


def _entries(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor).astype(np.float64).ravel()
