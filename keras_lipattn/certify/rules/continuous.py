"""Continuous depth, whose constant is that of the steps that run."""

from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.step import Step
from keras_lipattn.layers import ContinuousDepth


@register_rule(ContinuousDepth)
def continuous_depth(layer, call):
    bound = layer.lipschitz(sequence_length=call.state.tokens, norm=call.norm)
    return Step(
        constant=bound.value,
        theorem=bound.theorem,
        reason=bound.reason,
        longest=call.state.tokens if any(call.state.dynamic) else None,
    )
