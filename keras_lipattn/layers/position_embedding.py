"""A learned vector for each position."""

import keras
from keras import initializers, ops


@keras.saving.register_keras_serializable(package="keras_lipattn")
class PositionEmbedding(keras.layers.Layer):
    """Add a learned vector to the token at each position, a translation with constant 1.

    Args:
        max_length: Number of positions; the static length of the input by default. Shorter inputs
            use the first positions.
        initializer: Initializer of the embedding `(max_length, features)`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, tokens, features)`.

    Raises:
        ValueError: If the number of positions is unknown, or the static length of the input exceeds
            it.

    Example:

    >>> tokens = keras.Input((10, 64))
    >>> PositionEmbedding()(tokens).shape
    (None, 10, 64)
    """

    def __init__(self, max_length=None, initializer="glorot_uniform", **kwargs):
        if max_length is not None and max_length <= 0:
            raise ValueError(
                f"`max_length` must be a positive integer. Received: max_length={max_length}"
            )
        super().__init__(**kwargs)
        self.supports_masking = True
        self.max_length = max_length
        self.initializer = initializers.get(initializer)

    def build(self, input_shape):
        length = input_shape[1] if len(input_shape) == 3 else None
        positions = self.max_length or length
        if len(input_shape) != 3 or positions is None or (length or 0) > positions:
            raise ValueError(
                "The input must have shape `(batch, tokens, features)` and at most `max_length` "
                "tokens. Without `max_length`, its length must be static. "
                f"Received: input_shape={tuple(input_shape)}, max_length={self.max_length}"
            )
        self.embedding = self.add_weight(
            name="embedding", shape=(positions, input_shape[-1]), initializer=self.initializer
        )

    def call(self, inputs):
        length = ops.shape(inputs)[1]
        embedding = ops.convert_to_tensor(self.embedding)
        return inputs + ops.cast(embedding[:length], inputs.dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "max_length": self.max_length,
            "initializer": initializers.serialize(self.initializer),
        }
