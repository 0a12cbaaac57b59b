"""Embeddings: integer inputs are certified from the output of the lookup."""

import math

import keras

from keras_lipattn.certify.registry import register_operation, register_rule
from keras_lipattn.certify.rules.linear import matrix_step, quantized
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.certify.weights import as_run, kernel_of

_THEOREM = "certified from its output on: the integers stay fixed"


@register_rule(keras.layers.Embedding)
def embedding(layer, call):
    return _lookup(layer, call)


@register_operation("Take")
def take(operation, call):
    table, indices = [*call.args, *call.kwargs.values()][:2]
    looked_up = isinstance(indices, TensorState) and (indices.held or indices.discrete is not None)
    if isinstance(table, TensorState) or not looked_up:
        return Step(
            constant=math.inf,
            reason="it picks entries by an array, perhaps some more than once",
        )
    return Step(constant=1.0, theorem=_THEOREM, exact=True, starts=True)


@register_rule(keras.layers.ReversibleEmbedding)
def reversible_embedding(layer, call):
    reverse = call.kwargs.get("reverse", call.args[1] if len(call.args) > 1 else False)
    if not reverse:
        return _lookup(layer, call)
    refusal = quantized(layer)
    if refusal is not None:
        return refusal
    if layer.tie_weights:
        kernel = kernel_of(layer, "embeddings").T
    else:
        kernel = kernel_of(layer, "reverse_embeddings")
    if layer.reverse_dtype is not None:
        kernel = as_run(kernel, layer.reverse_dtype)
    step = matrix_step(kernel, None, call.norm)
    if layer.logit_soft_cap is not None:
        return Step.chain(step, Step(constant=1.0, theorem="largest slope", entry_offset=0.0))
    return step


def _lookup(layer, call) -> Step:
    state = call.states[0]
    if not state.held and state.discrete is None:
        return Step(
            constant=math.inf,
            reason="it looks up rows by a certified input, which jumps; declare the input with "
            "an integer dtype",
        )
    return Step(
        constant=1.0, theorem=_THEOREM, exact=True, starts=True, adds_mask=bool(layer.mask_zero)
    )
