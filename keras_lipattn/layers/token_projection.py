"""Projection of tokens onto a ball."""

import math
from typing import Any

import keras
from keras import ops

from keras_lipattn._arguments import require_norm, require_positive
from keras_lipattn.bounds.bounded_tokens import projection_constant
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# Squares are taken of tokens divided by this many radii: those up to 10^28 radii do not overflow.
_UNIT = 2.0**32


def project_tokens(tokens, radius, dtype):
    """The closest token of norm at most `radius`, for every token along the last axis.

    Args:
        tokens: Tensor `(..., D)`.
        radius: A positive number.
        dtype: The compute dtype. A token that is moved ends a few roundings inside the ball, so
            that rounding it to this dtype leaves it there.
    """
    x = ops.cast(tokens, "float64" if dtype == "float64" else "float32")
    inner = inner_radius(radius, tokens.shape[-1], dtype)
    square = ops.sum(ops.square(x * (1.0 / (inner * _UNIT))), axis=-1, keepdims=True)
    outside = square > _UNIT**-2
    # The inner `where` keeps the infinite slope of the root at 0 out of the gradient.
    factor = ops.rsqrt(ops.where(outside, square, 1.0)) * (1.0 / _UNIT)
    return ops.cast(x * ops.where(outside, factor, 1.0), dtype)


def inner_radius(radius, width, dtype):
    """Radius of the ball that tokens are projected onto before they are rounded to `dtype`."""
    computed = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    return radius * (1.0 - 2.0 * UNIT_ROUNDOFF[dtype] - (width + 8) * computed)


@keras.saving.register_keras_serializable(package="keras_lipattn")
class TokenProjection(keras.layers.Layer):
    """`x * min(1, radius / |x|)` for every token: its projection onto a ball about the origin.

    Tokens inside the ball do not change, so a radius a little above the largest token leaves a
    trained model what it is. Constants: 1 in the 2-norm and in the token norm, and
    `(1 + sqrt(D)) / 2` in the max norm. All three are exact.

    Attention after it has a constant that does not depend on the number of tokens
    (`BoundedMultiHeadAttention` and `L2MultiHeadAttention(token_radius=...)` have the projection
    built in). Which normalization to use:

    - `keras.layers.LayerNormalization` divides by a standard deviation: its constant is about
      `1 / sqrt(epsilon)`, 32 by default, in every block.
    - `CenterNormalization` subtracts the mean and has a constant of about 1, but tokens may be
      anywhere after it. It suits `L2MultiHeadAttention`, which needs no ball.
    - `TokenProjection` has the constant 1 and bounds the tokens. It suits all attention, and it is
      the only one after which dot-product attention has a constant.

    Args:
        radius: Radius of the ball, a positive number.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., d)`. Masks are passed on.

    Example:

    >>> layer = TokenProjection(5.0)
    >>> layer(np.array([[[3.0, 4.0], [6.0, 8.0]]])).numpy().round(4).tolist()
    [[[3.0, 4.0], [3.0, 4.0]]]
    >>> layer.lipschitz(norm="token").value
    1.0

    Reference:
        docs/theory.md, Section 4 (the projection and the attention after it).
    """

    def __init__(self, radius, **kwargs):
        require_positive("radius", radius, optional=False)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.radius = radius

    def build(self, input_shape):
        self._width = input_shape[-1]

    def call(self, inputs):
        return project_tokens(inputs, self.radius, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant, exact in every norm.

        Args:
            sequence_length: Ignored; the layer treats each token separately.
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry).
            mask: Ignored; the layer treats each token separately.

        Returns:
            A `LipschitzBound` of kind `"certified"`.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        if not self.built:
            raise ValueError(
                f"The layer has no shape yet: build it, or call it on data, first. "
                f"Received: built={self.built}"
            )
        require_norm("norm", norm)
        value = 1.0 if norm != "linf" else math.inf
        if norm == "linf" and self._width is not None:
            value = projection_constant(norm, self._width)
        return LipschitzBound(
            value=value,
            norm=norm,
            kind="certified",
            theorem="projection onto a ball",
            reason="" if math.isfinite(value) else "the size of the last axis is not known",
        )

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        """The constant of `lipschitz`, which no weight changes."""
        return self.lipschitz(norm=norm).value

    def get_config(self):
        return {**super().get_config(), "radius": self.radius}
