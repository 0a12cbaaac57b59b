"""Exchanging dot-product attention for L2 attention in a trained model."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src import backend

from keras_lipattn._seen_calls import specs_of
from keras_lipattn.certification.keras_models import call_specs, function_of, names_kept
from keras_lipattn.conversion._slots import attention_slots, exchange, is_plain_graph
from keras_lipattn.conversion._tied_weights import matching_value, tied_query
from keras_lipattn.conversion.conversion import Conversion
from keras_lipattn.conversion.converted import as_converted
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

    Attention is found wherever Keras finds layers: in the graph of a model, in nested models, in
    attributes, lists and dictionaries of custom layers and of subclassed models. A layer of two
    places stays one layer. All other layers, names, masks and states are copied bit for bit, and
    the model is compiled if the original is, with a new optimizer.

    Attention stays what it is, with its reason in `Conversion.kept`, where the model calls it with
    a value or key other than the query (cross-attention), or not at all at inference, and where it
    has a gate, is quantised, or is an instance of a subclass.

    Args:
        model: A built model, left as it is. It must be one that Keras can save: the copy is made
            from its configuration.
        x: A batch of inputs to measure the error on, in the structure that `model` is called on.
            Subclassed models that take integers need it, or an earlier `fit` with a
            `LipschitzMonitor`: Keras keeps shapes of inputs, but no dtypes.

    Returns:
        A `Conversion`: the new model, what was replaced and what was kept, and the relative error
        on `x`. Layers and models whose own code makes their attention get a class that is derived
        from theirs and from `Converted`, which knows how to load what was saved.

    Raises:
        ValueError: If `model` is not a built model, cannot be made from its configuration, or
            cannot be called on what is known about its inputs.

    Example:

    >>> conversion = keras_lipattn.convert_attention(model, x)
    >>> conversion.model.compile("adam", "mse")
    >>> conversion.model.fit(x, model.predict(x), epochs=10)
    >>> keras_lipattn.certify(conversion.model)
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built `keras.Model`. Received: model={model!r}")
    arguments = _arguments(model, x)
    olds = attention_slots(model)
    with names_kept():
        copy = _copy(model, arguments)
        pairs = list(zip(model._flatten_layers(), copy._flatten_layers(), strict=True))
        # Names that Keras makes up are others in the copy, the order is the same.
        slots = dict(zip(olds, attention_slots(copy).values(), strict=True))
        reasons = _reasons_to_keep(copy, olds, slots, arguments)
        news = {path: _successor(olds[path]) for path in slots if reasons.get(path) == ""}
        exchange(copy, {id(slots[path]): new for path, new in news.items()})
        _keep_for_loading(copy, list(news.values()))
        _call_symbolically(copy, arguments)
    gone = {id(inner) for path in news for inner in slots[path]._flatten_layers()}
    for old, new in pairs:
        if id(new) not in gone:
            _copy_state(old, new)
    for path, new in news.items():
        _imitate(olds[path], new)
    if model.compiled:
        copy.compile_from_config(model.get_compile_config())
    return Conversion(
        model=copy,
        replaced=tuple(news),
        kept={path: reason for path, reason in reasons.items() if reason},
        relative_error=None if x is None else _relative_error(model, copy, x),
    )


def _arguments(model: keras.Model, x: Any) -> tuple:
    """The positional arguments of a call of `model`, as symbols."""
    function = function_of(model)
    if function is not None:
        return (keras.tree.map_structure(lambda tensor: tensor, function._inputs_struct),)
    if x is not None:
        return specs_of((keras.tree.map_structure(keras.ops.convert_to_tensor, x),))
    return call_specs(model)[0]


def _call_symbolically(model: keras.Model, arguments: tuple) -> None:
    try:
        backend.compute_output_spec(model, *arguments, training=False)
    except Exception as error:
        shapes = keras.tree.map_structure(lambda leaf: f"{leaf.dtype} {leaf.shape}", arguments)
        raise ValueError(
            f"The model cannot be called on what is known about its inputs: {error} "
            f"Received: inputs {shapes}"
        ) from error


def _copy(model: keras.Model, arguments: tuple) -> keras.Model:
    """A model of the same configuration, not compiled. What graphs share stays shared."""
    copies: dict[int, Any] = {}
    # Configurations name classes; not all of them are registered.
    classes = {
        keras.saving.get_registered_name(type(layer)): type(layer)
        for layer in model._flatten_layers()
        if not type(layer).__module__.startswith("keras.")
    }

    def copy_of(operation):
        if id(operation) not in copies:
            if is_plain_graph(operation):
                copies[id(operation)] = _copy_graph(operation, copy_of)
            else:
                copies[id(operation)] = type(operation).from_config(operation.get_config())
        return copies[id(operation)]

    try:
        with keras.saving.CustomObjectScope(classes):
            copy = copy_of(model)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"Model {model.name!r} cannot be copied, Keras cannot make it from its configuration: "
            f"{error} Received: model={model!r}"
        ) from error
    _call_symbolically(copy, arguments)
    return copy


def _copy_graph(model: Any, copy_of: Callable) -> keras.Model:
    inputs = None
    if not isinstance(model, keras.Sequential):
        # Keras would name the copy of an input that has no name after a counter.
        inputs = keras.tree.map_structure(
            lambda tensor: copy_of(tensor._keras_history.operation).output, model.input
        )
    return keras.models.clone_model(model, input_tensors=inputs, clone_function=copy_of)


def _reasons_to_keep(
    copy: keras.Model, olds: dict[str, Any], slots: dict[str, Any], arguments: tuple
) -> dict[str, str]:
    """Why each dot-product attention has to stay; empty for those that need not.

    Args:
        copy: The copy of the model, which is called.
        olds: Attention layers of the model.
        slots: Those of the copy, by the same paths.
        arguments: What models are called on.
    """
    calls: dict[int, list[str]] = {id(layer): [] for layer in slots.values()}
    plain = [layer for layer in slots.values() if type(layer) is keras.layers.MultiHeadAttention]

    class Recording(keras.layers.MultiHeadAttention):
        # Before Keras converts arguments, which may turn one tensor into two.
        def __call__(self, query, value, key=None, *args, **kwargs):
            calls[id(self)].append(_cross_attention(query, value, key))
            return super().__call__(query, value, key, *args, **kwargs)

    try:
        for layer in plain:
            layer.__class__ = Recording
        _call_symbolically(copy, arguments)
    finally:
        for layer in plain:
            layer.__class__ = keras.layers.MultiHeadAttention
    return {
        path: _reason(old, calls[id(slots[path])])
        for path, old in olds.items()
        if isinstance(old, keras.layers.MultiHeadAttention)
    }


def _cross_attention(query: Any, value: Any, key: Any) -> str:
    for name, tensor in (("value", value), ("key", key)):
        if tensor is not None and tensor is not query:
            return (
                f"it is called with a {name} that is not the query (cross-attention), for which no "
                "Lipschitz bound exists"
            )
    return ""


def _reason(layer: Any, calls: list[str]) -> str:
    if type(layer) is not keras.layers.MultiHeadAttention:
        return f"it is a subclass, {type(layer).__name__}, whose own code is not known"
    if layer.get_config()["use_gate"]:
        return "it has a gate: multiplying by one has no Lipschitz bound"
    if not calls:
        return "the model does not call it at inference, so what it attends to is not known"
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense):
        if dense.quantization_mode is not None:
            return f"it is quantised: {dense.name!r} has dtype {dense.dtype_policy.name!r}"
    return next((call for call in calls if call), "")


def _successor(old: keras.layers.MultiHeadAttention) -> L2MultiHeadAttention:
    """The L2 attention for the place of `old`, with new weights."""
    config = old.get_config()
    del config["use_gate"]
    new = L2MultiHeadAttention.from_config(config)
    shapes = old.get_build_config() or {}
    new.build(shapes["shapes_dict"]["query_shape"])
    return new


def _keep_for_loading(layer: Any, news: list[Any]) -> None:
    """Gives the outermost layers whose configuration does not hold `news` one that does."""
    attention = list(attention_slots(layer).values())
    places = [index for index, one in enumerate(attention) if any(one is new for new in news)]
    if not places:
        return
    if not is_plain_graph(layer):
        as_converted(layer, tuple(places))
        return
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        if not any(inner is one for one in attention):
            _keep_for_loading(inner, news)


def _copy_state(old: Any, new: Any) -> None:
    if old.built and not new.built:
        # The model does not call it at inference.
        new.build_from_config(old.get_build_config())
    if getattr(old, "quantization_mode", None) != getattr(new, "quantization_mode", None):
        # Attention does not say in its configuration that the layers inside are quantised.
        new.quantize(old.quantization_mode)
    own = [one._trainable_variables + one._non_trainable_variables for one in (old, new)]
    seeds = [[seed.state for seed in one._seed_generators] for one in (old, new)]
    sources, targets = (a + b for a, b in zip(own, seeds, strict=True))
    if [source.shape for source in sources] != [target.shape for target in targets]:
        raise ValueError(
            f"Layer {old.name!r} cannot be copied: `from_config(get_config())` makes a layer with "
            f"other weights. Received: {type(old).__name__}"
        )
    for source, target in zip(sources, targets, strict=True):
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
