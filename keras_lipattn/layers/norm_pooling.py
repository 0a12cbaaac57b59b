"""Pooling by the 2-norm."""

import math

import keras
from keras import ops

from keras_lipattn._arguments import as_tuple

# Its square is a float32 number; a smaller norm becomes this, which has a derivative.
FLOOR = 2e-19


@keras.saving.register_keras_serializable(package="keras_lipattn")
class NormPooling(keras.layers.Layer):
    """The 2-norm of each channel over windows that do not overlap.

    The norm of disjoint parts changes by at most the change of its part, so the Lipschitz constant
    in the 2-norm is 1. It is attained: along a pooled vector, gradients keep their length, where a
    mean over `P` positions shrinks them by `sqrt(P)`. In the token norm and the max norm the
    constant is the square root of the number of positions in a window. A norm below 2e-19 becomes
    that.

    Args:
        pool_size: Side of the windows, an integer or one for each axis of tokens; `None` for one
            window of all positions.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: `(batch, ..., channels)` with at least one axis of tokens.
    Output shape: `(batch, ..., channels)` with the axes divided by `pool_size`; `(batch, channels)`
    for `None`.

    Raises:
        ValueError: If `pool_size` is not positive, has another number of axes than the input, or
            does not divide them.

    Example:

    >>> x = keras.ops.convert_to_tensor([[[3.0], [4.0], [0.0], [2.0]]])
    >>> keras.ops.convert_to_numpy(NormPooling(2)(x))[0, :, 0].tolist()
    [5.0, 2.0]

    Reference:
        Boureau, Ponce, LeCun, "A theoretical analysis of feature pooling in visual recognition",
        ICML 2010.
    """

    def __init__(self, pool_size=None, **kwargs):
        sizes = as_tuple("pool_size", pool_size)
        if sizes is not None and min(sizes) < 1:
            raise ValueError(f"`pool_size` must be positive. Received: pool_size={pool_size}")
        super().__init__(**kwargs)
        self.pool_size = pool_size

    def window(self, input_shape):
        """Sides of a window; `None` for an axis of unknown length that it spans."""
        sides = tuple(input_shape[1:-1])
        sizes = as_tuple("pool_size", self.pool_size)
        if sizes is None:
            return sides
        if len(sizes) == 1:
            sizes = sizes * len(sides)
        if len(sizes) != len(sides) or any(
            side is None or side % size for side, size in zip(sides, sizes, strict=True)
        ):
            raise ValueError(
                "`pool_size` must divide every axis of tokens, which must be static. "
                f"Received: input_shape={tuple(input_shape)}, pool_size={self.pool_size}"
            )
        return sizes

    def build(self, input_shape):
        if len(input_shape) < 3:
            raise ValueError(
                f"The input must have an axis of tokens. Received: input_shape={tuple(input_shape)}"
            )
        self.window(input_shape)

    def call(self, inputs):
        rank = len(inputs.shape)
        # Squares of half precision overflow early.
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        x = ops.cast(inputs, wide)
        axes = tuple(range(1, rank - 1))
        if self.pool_size is not None:
            sizes = self.window(inputs.shape)
            counts = self.compute_output_shape(inputs.shape)[1:-1]
            blocks = [part for pair in zip(counts, sizes, strict=True) for part in pair]
            x = ops.reshape(x, (-1, *blocks, inputs.shape[-1]))
            axes = tuple(range(2, 2 * rank - 3, 2))
        squares = ops.sum(ops.square(x), axis=axes)
        # The root has no derivative at zero.
        return ops.cast(ops.sqrt(ops.maximum(squares, FLOOR**2)), self.compute_dtype)

    def positions(self, input_shape):
        """Number of positions in a window, `None` if it is not known."""
        window = self.window(input_shape)
        return None if None in window else math.prod(window)

    def compute_output_shape(self, input_shape):
        if self.pool_size is None:
            return (input_shape[0], input_shape[-1])
        window = self.window(input_shape)
        counts = [side // size for side, size in zip(input_shape[1:-1], window, strict=True)]
        return (input_shape[0], *counts, input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "pool_size": self.pool_size}
