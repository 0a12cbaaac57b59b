"""An activation that preserves the norm of gradients, cheaper than `MaxMin`."""

import keras
from keras import ops

from keras_lipattn.layers.max_min import require_even


@keras.saving.register_keras_serializable(package="keras_lipattn")
class HalfAbs(keras.layers.Layer):
    """Replace the second half of the entries of the last axis by their absolute values.

    It is `MaxMin` between two rotations: for the pair `(a, b)`, `((a + b) / sqrt(2),
    |a - b| / sqrt(2))` rotated back is `(max(a, b), min(a, b))`. Between layers with orthonormal
    kernels, which can learn the rotations, both have the same models. The Jacobian is diagonal with
    entries 1 and -1, so the Lipschitz constant is 1 in every norm, and gradients keep their norm.

    Input and output shape: `(batch, ..., d)`, where `d` is even.

    Raises:
        ValueError: If the last axis is not static and even.

    Example:

    >>> x = keras.ops.convert_to_tensor([[-1.0, 2.0, -3.0, 4.0]])
    >>> keras.ops.convert_to_numpy(HalfAbs()(x)).tolist()
    [[-1.0, 2.0, 3.0, 4.0]]

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
        return ops.concatenate([first, ops.abs(second)], axis=-1)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)
