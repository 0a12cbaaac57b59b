"""An activation that loses no gradient."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_lipattn")
class MaxMin(keras.layers.Layer):
    """Sorts the last axis in pairs: entries `i` and `i + d/2` become their maximum and minimum.

    Its Jacobian permutes entries, so its constant is 1 in every norm and it keeps the norm of a
    gradient, where ReLU sets half of it to zero: what networks of constant 1 need.

    Input and output shape: `(batch, ..., d)`, `d` even.

    Raises:
        ValueError: If the last axis is not static and even.

    Reference:
        Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape):
        if input_shape[-1] is None or input_shape[-1] % 2:
            raise ValueError(
                f"The last axis must be static and even. Received: input_shape={tuple(input_shape)}"
            )

    def call(self, inputs):
        first, second = ops.split(inputs, 2, axis=-1)
        return ops.concatenate([ops.maximum(first, second), ops.minimum(first, second)], axis=-1)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)
