"""Layers that do nothing at inference."""

import math

import keras

from keras_lipattn.certify.registry import register_operation, register_rule
from keras_lipattn.certify.step import Step


def identity(theorem: str = "identity at inference") -> Step:
    """The step of a layer that returns its input."""
    return Step(constant=1.0, theorem=theorem, exact=True, is_linear_map=True)


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
        return Step(
            constant=math.inf,
            reason="the graph calls it with `training=True`: it draws random numbers at inference",
        )
    return identity()


@register_rule(keras.layers.ActivityRegularization, keras.layers.Identity)
def unchanged(layer, call):
    return identity("identity")


@register_operation("Copy", "ConvertToTensor", "StopGradient", "Array")
def unchanged_operation(operation, call):
    return identity("identity")


@register_operation("View")
def view(operation, call):
    if call.output_dtype != call.state.dtype:
        return Step(
            constant=math.inf,
            reason=f"it reads the bits of {call.state.dtype} as {call.output_dtype}, and they jump",
        )
    return identity("identity")


@register_operation("Cast", "SaturateCast")
def cast(operation, call):
    # Between floating dtypes; casts to integers never come here. Real arithmetic: no rounding.
    return identity("identity")
