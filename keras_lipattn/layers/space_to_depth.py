"""Down-sampling without a loss: blocks of tokens become tokens."""

import keras
from keras import layers

from keras_lipattn._arguments import require_positive_integer


@keras.saving.register_keras_serializable(package="keras_lipattn")
class SpaceToDepth(layers.Layer):
    """Put the entries of each block of neighboring tokens into one token.

    Entries only move, so the map is an isometry in the 2-norm and the max norm. In the token norm
    its constant is the square root of the number of tokens in a block. With `OrthogonalDense`
    after it, it is a patch embedding, or a down-sampling step, of constant 1.

    Args:
        block_size: Side of a block, which divides every axis between the batch and the last.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: `(batch, height, width, channels)`, or with another number of axes of tokens.
    Output shape: `(batch, height / b, width / b, b * b * channels)` for blocks of side `b`.

    Raises:
        ValueError: If `block_size` is not positive, the input has no axis of tokens, or an axis is
            not static or not a multiple of `block_size`.

    Example:

    >>> image = keras.Input((28, 28, 1))
    >>> patches = OrthogonalDense(96)(SpaceToDepth(7)(image))
    >>> patches.shape
    (None, 4, 4, 96)
    """

    def __init__(self, block_size, **kwargs):
        require_positive_integer("block_size", block_size)
        super().__init__(**kwargs)
        self.block_size = block_size

    def build(self, input_shape):
        size, shape = self.block_size, self.compute_output_shape(input_shape)
        axes = range(2, 2 * len(shape) - 4 + 1, 2)
        blocks = [part for count in shape[1:-1] for part in (count, size)]
        # Layers of Keras, since the proof of an export knows them.
        self._split = layers.Reshape((*blocks, input_shape[-1]), name="split")
        order = (*[axis - 1 for axis in axes], *axes, 2 * len(shape) - 3)
        self._move = layers.Permute(order, name="move")
        self._merge = layers.Reshape(shape[1:], name="merge")

    def call(self, inputs):
        return self._merge(self._move(self._split(inputs)))

    def compute_output_shape(self, input_shape):
        sides, size = tuple(input_shape[1:-1]), self.block_size
        if not sides or None in input_shape[1:] or any(side % size for side in sides):
            raise ValueError(
                "Every axis of tokens must be static and a multiple of `block_size`. "
                f"Received: input_shape={tuple(input_shape)}, block_size={size}"
            )
        counts = [side // size for side in sides]
        return (input_shape[0], *counts, size ** len(sides) * input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "block_size": self.block_size}
