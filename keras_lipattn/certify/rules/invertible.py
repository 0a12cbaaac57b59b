"""Invertible layers, whose second term is a contraction by construction."""

from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.step import Step
from keras_lipattn.layers import InvertibleResidual, InvertibleSequential


@register_rule(InvertibleResidual, InvertibleSequential)
def invertible(layer, call):
    bound = layer.lipschitz(norm=call.norm)
    return Step(
        constant=bound.value,
        theorem=bound.theorem,
        reason=bound.reason,
        longest=layer.max_sequence_length if any(call.state.dynamic) else None,
    )
