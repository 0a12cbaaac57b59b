"""Layers around another layer: how they run it on symbolic tensors."""

import keras

from keras_lipattn.certification.reasons import Cause, Reason, in_training
from keras_lipattn.certification.tracing import TraceError, register_expansion


@register_expansion(keras.layers.SpectralNormalization)
def spectral_normalization(layer, inputs, training=False):
    # At inference it runs the wrapped layer with the kernel as stored, normalized or not.
    if training:
        raise TraceError(in_training("it overwrites its kernel"))
    return layer.layer(inputs)


@register_expansion(keras.layers.TimeDistributed)
def time_distributed(layer, inputs, training=None, mask=None):
    """The same layer on every slice: as a batch with more examples."""
    inner = layer.layer
    if mask is not None and inner._call_has_mask_arg:
        raise TraceError("it passes slices of a mask to the layer inside")
    if inner.compute_dtype != layer.compute_dtype and layer.compute_dtype != layer.variable_dtype:
        raise TraceError("the layer inside has a dtype of its own")
    batch, time, *sizes = inputs.shape
    if time is None:
        raise TraceError(Reason("its number of slices is not known", cause=Cause.SIZE))
    options = {"training": training} if inner._call_has_training_arg else {}
    # Not `__call__`, which would cast the slices to the dtype of the layer inside.
    outputs = inner.symbolic_call(keras.ops.reshape(inputs, (batch * time, *sizes)), **options)
    return keras.ops.reshape(outputs, (batch, time, *outputs.shape[1:]))
