"""Residual connections whose Lipschitz constant is known."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops
from scipy.special import expit


@keras.saving.register_keras_serializable(package="keras_lipattn")
class Residual(keras.layers.Layer):
    """Merges a skip and a branch: `x + f(x)`, or the convex `(1 - alpha) x + alpha f(x)`.

    With a branch of constant `L` the sum has constant `1 + L`; the convex combination
    `1 - alpha + alpha L`, which is at most 1 when the branch's is: depth then costs nothing.

    Args:
        alpha: `None` for the sum, or the weight of the branch, in `[0, 1]`.
        trainable_alpha: Whether `alpha` is learned, as the logistic function of a weight, so that
            it stays in `(0, 1)`. Its start must lie strictly between 0 and 1.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A pair `[x, f(x)]` of tensors of the same shape.

    Raises:
        ValueError: If `alpha` is out of range, or the inputs are not two tensors of one shape.

    Example:

    >>> x = keras.Input((10, 64))
    >>> y = Residual(alpha=0.5)([x, SpectralDense(64)(x)])
    """

    def __init__(self, alpha=None, trainable_alpha=False, **kwargs):
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise ValueError(f"`alpha` must be `None` or in [0, 1]. Received: alpha={alpha}")
        if trainable_alpha and (alpha is None or not 0.0 < alpha < 1.0):
            raise ValueError(
                f"`trainable_alpha` needs a start strictly between 0 and 1. Received: alpha={alpha}"
            )
        super().__init__(**kwargs)
        self.supports_masking = True
        self.alpha: Any = alpha
        self.trainable_alpha = trainable_alpha

    def build(self, input_shape):
        if not _are_two_alike(input_shape):
            raise ValueError(
                "`Residual` merges a list of two, a skip and a branch of the same shape. "
                f"Received: input_shape={input_shape}"
            )
        self.alpha_logit = None
        if self.trainable_alpha:
            start = math.log(self.alpha / (1.0 - self.alpha))
            self.alpha_logit = self.add_weight(
                name="alpha_logit",
                shape=(),
                initializer=keras.initializers.Constant(start),
                autocast=False,
            )

    def call(self, inputs):
        skip, branch = inputs
        if self.alpha is None:
            return skip + branch
        alpha = self.alpha
        if self.alpha_logit is not None:
            alpha = ops.cast(ops.sigmoid(ops.convert_to_tensor(self.alpha_logit)), skip.dtype)
        return skip + alpha * (branch - skip)

    def alpha_value(self):
        """The weight of the branch now, a float; `None` for the sum."""
        if self.alpha_logit is None:
            return self.alpha
        return float(expit(np.float64(self.alpha_logit.numpy())))

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[0]

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[0])

    def get_config(self):
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "trainable_alpha": self.trainable_alpha,
        }


def _are_two_alike(shapes):
    if len(shapes) != 2 or not all(isinstance(shape, list | tuple) for shape in shapes):
        return False
    # An unknown size may be any; examples and their number are the same anyway.
    return len(shapes[0]) == len(shapes[1]) and all(
        one is None or other is None or one == other
        for one, other in zip(shapes[0][1:], shapes[1][1:], strict=True)
    )
