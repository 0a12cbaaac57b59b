"""A loss under which a Lipschitz bound turns into certified radii."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_lipattn_examples")
class MarginCrossentropy(keras.losses.Loss):
    """Cross-entropy of `temperature * (logits - sqrt(2) * radius * onehot(class))`.

    Logits whose constant is 1 cannot grow, so plain cross-entropy stays large and pushes all
    margins alike. The temperature lets a margin count as large at the scale of the data, and the
    offset asks the right class to lead by what certifies `radius`.

    Args:
        radius: Radius asked for, in the units and norm of the input, for logits of constant 1.
        temperature: Factor of the logits.
        name: Name of the loss.
        **kwargs: Arguments of `keras.losses.Loss`.

    Reference:
        Prach, Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks",
        ECCV 2022.
    """

    def __init__(self, radius, temperature, name="margin_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)
        self.radius = radius
        self.temperature = temperature

    def call(self, y_true, y_pred):
        classes = ops.cast(ops.reshape(y_true, (-1,)), "int32")
        own = ops.one_hot(classes, y_pred.shape[-1], dtype=y_pred.dtype)
        logits = self.temperature * (y_pred - math.sqrt(2.0) * self.radius * own)
        losses = keras.losses.sparse_categorical_crossentropy(classes, logits, from_logits=True)
        return losses / self.temperature

    def get_config(self):
        return {
            **super().get_config(),
            "radius": self.radius,
            "temperature": self.temperature,
        }
