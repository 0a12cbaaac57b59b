"""Masks that a layer computes from its input: they jump, so they must be assumed fixed."""

import math

import keras

from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.step import Step


@register_rule(keras.layers.Masking)
def masking(layer, call):
    if call.assume_fixed_mask:
        # With the mask held, a projection that keeps some tokens.
        return Step(
            constant=1.0,
            theorem="projection on the tokens of a fixed mask",
            exact=True,
            mixes_tokens=True,
            domain=call.state.domain.around_origin(),
            adds_mask=True,
            assumes_fixed_mask=True,
        )
    return Step(
        constant=math.inf,
        reason="it computes a mask from its input, which jumps when the input moves; "
        "`assume_fixed_mask=True` certifies for a fixed mask",
        adds_mask=True,
    )
