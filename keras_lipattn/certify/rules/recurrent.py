"""Recurrent layers: no finite constant is known here."""

import math

import keras

from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.step import Step


@register_rule(
    keras.layers.RNN,
    keras.layers.SimpleRNN,
    keras.layers.LSTM,
    keras.layers.GRU,
    keras.layers.ConvLSTM1D,
    keras.layers.ConvLSTM2D,
    keras.layers.ConvLSTM3D,
    keras.layers.Bidirectional,
    subclasses=True,
)
def recurrent(layer, call):
    return Step(
        constant=math.inf,
        reason="the gates of a recurrent layer multiply functions of its input, and its constant "
        "grows with every step of the sequence",
    )
