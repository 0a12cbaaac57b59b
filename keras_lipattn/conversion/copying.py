"""Copies of models from their configuration, in which layers are then exchanged."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras.src import backend

from keras_lipattn.conversion.slots import as_converted, at, is_plain_graph, places_of


def copy_model(
    model: keras.Model, arguments: tuple, substitutes: Mapping[int, Any] | None = None
) -> keras.Model:
    """A model of the same configuration, not compiled. Shared layers stay shared.

    Args:
        model: A built model.
        arguments: Arguments of its call, as symbolic tensors.
        substitutes: Maps the `id` of an operation of a graph to the layer that takes its place,
            which is called on its tensor, or on the list of its tensors.
    """
    substitutes = substitutes or {}
    copies: dict[int, Any] = {}
    # Configurations contain names of classes, of which not all are registered.
    classes = {
        keras.saving.get_registered_name(type(layer)): type(layer)
        for layer in model._flatten_layers()
        if not type(layer).__module__.startswith("keras.")
    }

    def copy_of(operation):
        if id(operation) in substitutes:
            return substitutes[id(operation)]
        if id(operation) not in copies:
            if is_plain_graph(operation):
                copies[id(operation)] = _copy_graph(operation, copy_of, call)
            else:
                copies[id(operation)] = type(operation).from_config(operation.get_config())
        return copies[id(operation)]

    def call(operation, *args, **kwargs):
        if any(operation is layer for layer in substitutes.values()):
            tensors = [*args, *kwargs.values()]
            return operation(tensors if len(tensors) > 1 else tensors[0])
        return operation(*args, **kwargs)

    try:
        with keras.saving.CustomObjectScope(classes):
            copy = copy_of(model)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"Model {model.name!r} cannot be copied, since Keras cannot create it from its "
            f"configuration: "
            f"{error} Received: model={model!r}"
        ) from error
    call_symbolically(copy, arguments)
    return copy


def _copy_graph(model: Any, copy_of: Callable, call: Callable) -> keras.Model:
    options: dict[str, Any] = {}
    if not isinstance(model, keras.Sequential):
        # Keras would give the copy of an input without a name another generated name.
        options["input_tensors"] = keras.tree.map_structure(
            lambda tensor: copy_of(tensor._keras_history.operation).output, model.input
        )
        options["call_function"] = call
    copy = keras.models.clone_model(model, clone_function=copy_of, **options)
    # Keras compiles it as the original. `compile_alike` does so once the layers are exchanged.
    copy.compiled = False
    return copy


def call_symbolically(model: keras.Model, arguments: tuple) -> None:
    """Calls a model on symbolic tensors at inference, which builds what is not built."""
    try:
        backend.compute_output_spec(model, *arguments, training=False)
    except Exception as error:
        shapes = keras.tree.map_structure(lambda leaf: f"{leaf.dtype} {leaf.shape}", arguments)
        raise ValueError(
            f"The model cannot be called on the known shapes and dtypes of its inputs: {error} "
            f"Received: inputs {shapes}"
        ) from error


def convert_classes(layer: Any, news: list[Any], olds: list[Any]) -> None:
    """Converts the outermost layers whose configuration does not contain the layers `news`.

    Args:
        layer: A layer or model in which layers were exchanged.
        news: The new layers.
        olds: The layers that they replaced.
    """
    places = places_of(layer, news)
    if not places:
        return
    if not is_plain_graph(layer):
        classes = {id(new): type(old).__name__ for new, old in zip(news, olds, strict=True)}
        as_converted(layer, {place: classes[id(at(layer, place))] for place in places})
        return
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        if not any(inner is new for new in news):
            convert_classes(inner, news, olds)


def copy_state(old: Any, new: Any) -> None:
    """Copies the weights and random states of a layer, without those of the layers inside."""
    if old.built and not new.built:
        # A layer that the model does not call at inference.
        new.build_from_config(old.get_build_config())
    if getattr(old, "quantization_mode", None) != getattr(new, "quantization_mode", None):
        # The configuration of attention does not record that the layers inside are quantized.
        new.quantize(old.quantization_mode)
    own = [one._trainable_variables + one._non_trainable_variables for one in (old, new)]
    seeds = [[seed.state for seed in one._seed_generators] for one in (old, new)]
    sources, targets = (a + b for a, b in zip(own, seeds, strict=True))
    if [source.shape for source in sources] != [target.shape for target in targets]:
        raise ValueError(
            f"Layer {old.name!r} cannot be copied: `from_config(get_config())` creates a layer "
            f"with different weights. Received: {type(old).__name__}"
        )
    for source, target in zip(sources, targets, strict=True):
        target.assign(source)
    if isinstance(new, keras.layers.Normalization):
        # What it computes with is made from its weights.
        new.finalize_state()


def compile_alike(copy: keras.Model, model: keras.Model) -> None:
    """Compiles a copy as its original, if that is compiled, with a new optimizer."""
    if not model.compiled:
        return
    leaves = keras.tree.flatten(model._compile_config.config)
    # Losses and metrics of the user's own, of which not all are registered.
    custom = [leaf if hasattr(leaf, "__name__") else type(leaf) for leaf in leaves]
    names = {
        keras.saving.get_registered_name(one): one
        for one in custom
        if not one.__module__.startswith(("keras.", "builtins"))
    }
    with keras.saving.CustomObjectScope(names):
        copy.compile_from_config(model.get_compile_config())
