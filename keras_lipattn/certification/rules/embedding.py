"""Embeddings: integer inputs are certified from the output of the lookup."""

import keras

from keras_lipattn.certification.maps import Elementwise, LipschitzMap, chain, unbounded
from keras_lipattn.certification.reasons import (
    Reason,
)
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.rules.linear import matrix_map, quantized
from keras_lipattn.certification.rules.linear_operations import take_map
from keras_lipattn.certification.tensor_state import Kind, TensorState
from keras_lipattn.certification.weights import cast_to_compute_dtype, kernel_of

_FLOAT_INDICES = Reason(
    "it looks up rows by a certified input, and they jump when the input changes",
    remedy="declare this input with an integer dtype",
)
_THEOREM = "its output is a certified input: the integers stay fixed"


@register_rule(keras.layers.Embedding)
def embedding_layer(layer, call):
    return _lookup(layer, call)


@register_operation("Take")
def take(operation, call):
    table, indices = call.argument("x"), call.argument("indices")
    if isinstance(table, TensorState) and not table.is_fixed:
        return take_map(operation, indices, call)
    if isinstance(table, TensorState) or not isinstance(indices, TensorState):
        return unbounded("its table is not a constant of the model")
    if not indices.is_fixed and indices.kind is not Kind.INTEGER:
        return unbounded(_FLOAT_INDICES)
    return LipschitzMap(constant=1.0, theorem=_THEOREM, exact=True, resets_input=True)


@register_rule(keras.layers.ReversibleEmbedding)
def reversible_embedding(layer, call):
    if not call.argument("reverse"):
        return _lookup(layer, call)
    refusal = quantized(layer)
    if refusal is not None:
        return refusal
    if layer.tie_weights:
        kernel = kernel_of(layer, "embeddings").T
    else:
        kernel = kernel_of(layer, "reverse_embeddings")
    if layer.reverse_dtype is not None:
        kernel = cast_to_compute_dtype(kernel, layer.reverse_dtype)
    layer_map = matrix_map(kernel, None, call.norm)
    if layer.logit_soft_cap is not None:
        return chain(
            layer_map, Elementwise(constant=1.0, theorem="largest slope", value_at_zero=0.0)
        )
    return layer_map


def _lookup(layer, call) -> LipschitzMap:
    state = call.states[0]
    if not state.is_fixed and state.kind is not Kind.INTEGER:
        return unbounded(_FLOAT_INDICES)
    return LipschitzMap(constant=1.0, theorem=_THEOREM, exact=True, resets_input=True)
