"""Layers that do nothing at inference, `Masking`, recurrent layers and wrappers of layers."""

import keras

from keras_lipattn.certification.class_code import overrides_call_operator
from keras_lipattn.certification.maps import Affine, LipschitzMap, TokenMixing, unbounded
from keras_lipattn.certification.reasons import COMPUTES_MASK, Cause, Reason, in_training
from keras_lipattn.certification.registry import register_operation, register_rule
from keras_lipattn.certification.trace import TraceError
from keras_lipattn.certification.tracing import register_expansion


def identity(theorem: str = "identity at inference") -> LipschitzMap:
    """The map of a layer that returns its input."""
    return Affine(constant=1.0, theorem=theorem, exact=True)


@register_rule(
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)
def dropout(layer, call):
    if call.training:
        return unbounded(in_training("it draws random numbers"))
    return identity()


@register_rule(keras.layers.ActivityRegularization, keras.layers.Identity)
def unchanged(layer, call):
    return identity("identity")


@register_operation("Copy", "ConvertToTensor", "StopGradient", "Array")
def unchanged_operation(operation, call):
    return identity("identity")


@register_operation("View")
def view(operation, call):
    dtype = call.output_dtype if operation.dtype is None else operation.dtype
    if keras.backend.standardize_dtype(dtype) == call.state.dtype:
        return identity("identity")
    return unbounded("it reinterprets the bits of its input as another dtype")


@register_operation("Cast", "SaturateCast")
def cast(operation, call):
    # Between floating dtypes, and real arithmetic does not round. Casts to integers have no rule.
    return identity("identity")


@register_rule(keras.layers.Masking)
def masking(layer, call):
    if call.assume_fixed_mask:
        # It multiplies each token by 0 or 1.
        return TokenMixing(
            constant=1.0,
            theorem="projection on the tokens of a fixed mask",
            exact=True,
            range=call.state.range.about_origin(),
            assumes_fixed_mask=True,
        )
    return unbounded(COMPUTES_MASK)


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
    return unbounded(
        "it is a recurrent layer: its gates multiply functions of its input, and its constant "
        "grows with every step of the sequence"
    )


@register_expansion(keras.layers.SpectralNormalization)
def spectral_normalization(layer, inputs, training=False):
    # At inference it runs the inner layer with the stored kernel.
    if training:
        raise TraceError(in_training("it overwrites its kernel"))
    return layer.layer(inputs)


@register_expansion(keras.layers.TimeDistributed)
def time_distributed(layer, inputs, training=None, mask=None):
    """Runs the inner layer on all slices, as a batch with more examples."""
    inner = layer.layer
    if overrides_call_operator(inner):
        raise TraceError("its inner layer overrides `__call__`")
    if mask is not None and inner._call_has_mask_arg:
        raise TraceError("it passes slices of a mask to its inner layer")
    if inner.compute_dtype != layer.compute_dtype and layer.compute_dtype != layer.variable_dtype:
        raise TraceError("its inner layer has its own dtype")
    batch, time, *sizes = inputs.shape
    if time is None:
        raise TraceError(Reason("its number of slices is not known", cause=Cause.SIZE))
    options = {"training": training} if inner._call_has_training_arg else {}
    # Unlike `__call__`, this does not cast the slices to the dtype of the inner layer.
    outputs = inner.symbolic_call(keras.ops.reshape(inputs, (batch * time, *sizes)), **options)
    return keras.ops.reshape(outputs, (batch, time, *outputs.shape[1:]))
