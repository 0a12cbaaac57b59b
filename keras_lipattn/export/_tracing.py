"""The functions that are served, as TensorFlow graphs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lipattn.certification import Certificate
from keras_lipattn.certification.classifier_head import without_activation
from keras_lipattn.export._allowance import relative_error
from keras_lipattn.export._certified_answer import CertifiedAnswer
from keras_lipattn.export._plan import Plan
from keras_lipattn.export._ports import Port, output_names
from keras_lipattn.export.export_error import ExportError
from keras_lipattn.layers import lipschitz_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What is written.

    Args:
        holder: Trackable object with everything the functions use.
        signatures: Concrete functions by name.
        relative_error: `kappa` of the rounding allowance.
    """

    holder: Any
    signatures: Mapping[str, Any]
    relative_error: float


def call_model(model: keras.Model, structure: Any, ports: Sequence[Port], tensors: Mapping) -> Any:
    """Calls a model at inference on named tensors or arrays."""
    inputs = keras.tree.pack_sequence_as(structure, [tensors[port.name] for port in ports])
    return model(inputs, training=False)


def trace(
    model: keras.Model,
    structure: Any,
    ports: Sequence[Port],
    plan: Plan,
    certificate: Certificate,
    sequence_length: int | None,
) -> Traced:
    """Traces the signatures of a model; to be called while it is condensed.

    Raises:
        ExportError: If a layer does not run with its condensed constants.
    """
    import tensorflow as tf

    specs = {port.name: tf.TensorSpec(port.shape, port.dtype, name=port.name) for port in ports}

    def serving_default(**tensors):
        outputs = call_model(model, structure, ports, tensors)
        return dict(zip(output_names(outputs), keras.tree.flatten(outputs), strict=True))

    signatures = {"serving_default": _concrete(serving_default, specs, tf)}
    kappa = relative_error(signatures["serving_default"].graph, sequence_length)
    if not plan.refusal:
        answer = CertifiedAnswer(
            certificate=certificate,
            certified=plan.certified,
            embedded=plan.embedded,
            largest_embedding=plan.largest_embedding,
            sequence_length=sequence_length,
            relative_error=kappa,
        )

        def certified(**tensors):
            return answer(tensors, call_model(model, structure, ports, tensors))

        with without_activation(plan.ending.operation):
            signatures["certified"] = _concrete(certified, specs, tf)
    holder: Any = tf.Module()
    holder.constants = _constants(model, signatures.values())
    holder.tables = _lookup_tables(model, tf)
    return Traced(holder=holder, signatures=signatures, relative_error=kappa)


def _concrete(function: Any, specs: Mapping[str, Any], tf: Any) -> Any:
    # Keras layers are no subject for AutoGraph.
    return tf.function(function, autograph=False).get_concrete_function(**specs)


def _constants(model: keras.Model, functions: Any) -> dict[str, Any]:
    """The variables that the functions read, by their paths, and no others."""
    names = {id(variable.value): variable.path for variable in model.variables}
    raw = {}
    for layer in lipschitz_layers(model):
        raw.update({id(kernel.value): layer for kernel in layer._kernels()})
        state: Any = layer._condensed
        names.update({id(v.value): f"{layer.path}/{v.name}" for v in state.variables})
    constants: dict[str, Any] = {}
    for function in functions:
        for variable in function.graph.variables:
            if id(variable) in raw:
                raise ExportError(
                    "A layer must run with its condensed constants, but was traced before, by a "
                    "`tf.function` around it. Received: layer "
                    f"{raw[id(variable)].path!r} reading {variable.name!r}"
                )
            name = names.get(id(variable), variable.name)
            while name in constants and constants[name] is not variable:
                name += "_"
            constants[name] = variable
    return constants


def _lookup_tables(model: keras.Model, tf: Any) -> list[Any]:
    """Tables of the layers that look up strings or integers, which graphs do not list."""
    return [
        value
        for layer in model._flatten_layers()
        for value in vars(layer).values()
        if isinstance(value, tf.saved_model.experimental.TrackableResource)
    ]
