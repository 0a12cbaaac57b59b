"""Layers around another layer: what the inner one does decides."""

import dataclasses
import math

import keras

from keras_lipattn.certify.registry import register_rule
from keras_lipattn.certify.step import Step


@register_rule(keras.layers.SpectralNormalization)
def spectral_normalization(layer, call):
    # At inference it runs the wrapped layer with the kernel as stored, normalised or not.
    if call.training:
        return Step(
            constant=math.inf,
            reason="the graph calls it with `training=True`: it overwrites its kernel",
        )
    return call.walk_into(layer.layer, call.state)


@register_rule(keras.layers.TimeDistributed)
def time_distributed(layer, call):
    """The same layer on every slice: the constant of one slice serves for all in every norm."""
    state = call.state
    if call.state.masked or call.kwargs.get("mask") is not None:
        return Step(constant=math.inf, reason="it passes slices of a mask to the layer inside")
    inner = call.walk_into(
        layer.layer,
        state.replace(shape=state.shape[1:], dynamic=state.dynamic[1:], near=None),
    )
    return dataclasses.replace(inner, shape=call.shape, dynamic=call.dynamic, near=None)
