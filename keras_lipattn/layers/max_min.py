"""An activation that preserves the norm of gradients."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_lipattn")
class MaxMin(keras.layers.Layer):
    """Sort the entries of the last axis in pairs.

    Entries `i` and `i + d/2` are replaced by their maximum and minimum. The Jacobian is a
    permutation, so the Lipschitz constant is 1 in every norm, and gradients keep their norm. ReLU
    sets about half of their entries to zero, which limits networks with the constant 1.

    Input and output shape: `(batch, ..., d)`, where `d` is even.

    Raises:
        ValueError: If the last axis is not static and even.

    Example:

    >>> x = keras.ops.convert_to_tensor([[1.0, 2.0, 3.0, 0.0]])
    >>> keras.ops.convert_to_numpy(MaxMin()(x)).tolist()
    [[3.0, 2.0, 1.0, 0.0]]

    Reference:
        Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape):
        require_even(input_shape)

    def call(self, inputs):
        first, second = ops.split(inputs, 2, axis=-1)
        return ops.concatenate([ops.maximum(first, second), ops.minimum(first, second)], axis=-1)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)


def require_even(input_shape):
    """Raises a `ValueError` unless the last axis is static and even."""
    if input_shape[-1] is None or input_shape[-1] % 2:
        raise ValueError(
            f"The last axis must be static and even. Received: input_shape={tuple(input_shape)}"
        )
