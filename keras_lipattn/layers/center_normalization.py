"""Normalization by centering only, which has a finite Lipschitz constant."""

from typing import Any

import keras
import numpy as np
from keras import initializers, ops

from keras_lipattn._arguments import require_norm
from keras_lipattn.bounds.layer_constants import center_normalization_constant
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._precision import cast_to_compute_dtype, is_finite


@keras.saving.register_keras_serializable(package="keras_lipattn")
class CenterNormalization(keras.layers.Layer):
    """`gamma * d / (d - 1) * (x - mean(x)) + beta` over the last axis, of size `d`.

    `LayerNormalization` divides by a standard deviation, so its Lipschitz constant is about
    `1 / sqrt(epsilon)`, 32 by default. This layer has the constant
    `d / (d - 1) * ||diag(gamma) (I - 11^T / d)||`, at most `d / (d - 1) * max|gamma|`.

    Args:
        center: Whether to add the learned offset `beta`.
        scale: Whether to multiply by the learned `gamma`.
        beta_initializer: Initializer of `beta`.
        gamma_initializer: Initializer of `gamma`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., d)`, where `d >= 2`.

    Raises:
        ValueError: If the last axis is not static or has fewer than two entries.

    Example:

    >>> layer = CenterNormalization()
    >>> layer.build((None, 64))
    >>> round(layer.lipschitz().value, 4)
    1.0159

    Reference:
        Qi, Wang, Chen, Shi, Zhang, "LipsFormer: Introducing Lipschitz Continuity to Vision
        Transformers", ICLR 2023, Section 4.1.
    """

    def __init__(
        self,
        center=True,
        scale=True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)

    def build(self, input_shape):
        features = input_shape[-1]
        if features is None or features < 2:
            raise ValueError(
                "The last axis must be static and have at least two entries. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self._features = features
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self.add_weight(
                name="gamma", shape=(features,), initializer=self.gamma_initializer
            )
        if self.center:
            self.beta = self.add_weight(
                name="beta", shape=(features,), initializer=self.beta_initializer
            )

    def call(self, inputs):
        # The mean of many entries is inaccurate in low precision.
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        x = ops.cast(inputs, dtype)
        output = (x - ops.mean(x, axis=-1, keepdims=True)) * self._gain
        output = ops.cast(output, self.compute_dtype)
        if self.gamma is not None:
            output = output * ops.cast(self.gamma, self.compute_dtype)
        if self.beta is not None:
            output = output + ops.cast(self.beta, self.compute_dtype)
        return output

    def compute_output_shape(self, input_shape):
        # Without it Keras traces `call` to find the shape.
        return tuple(input_shape)

    @property
    def _gain(self):
        return self._features / (self._features - 1)

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant for the current weights, exact in every norm.

        Args:
            sequence_length: Ignored; the layer treats each token separately.
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry).
            mask: Ignored; the layer treats each token separately.

        Returns:
            A `LipschitzBound` of kind `"certified"`; `inf` with the reason when `gamma` is not
            finite.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        if not self.built:
            raise ValueError(
                "The layer has no weights yet: build it, or call it on data, first. "
                f"Received: built={self.built}"
            )
        require_norm("norm", norm)
        reason = ""
        for name, weight in (("gamma", self.gamma), ("beta", self.beta)):
            if not is_finite(weight, self.compute_dtype):
                reason = f"{name} holds NaN or infinite entries"
        gamma = np.ones(self._features)
        if self.gamma is not None:
            gamma = cast_to_compute_dtype(self.gamma, self.compute_dtype)
        return LipschitzBound(
            value=np.inf if reason else center_normalization_constant(gamma, norm),
            norm=norm,
            kind="certified",
            theorem="operator norm",
            reason=reason,
        )

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        """Differentiable upper bound as a tensor of the graph; `lipschitz` is tighter."""
        if self.gamma is None:
            return self.lipschitz(norm=norm).value
        # ||diag(gamma) (I - 11^T / d)|| is at most max |gamma| in the 2-norm, twice that in linf.
        largest = ops.max(ops.abs(ops.cast(self.gamma, self.compute_dtype)))
        return self._gain * (2.0 if norm == "linf" else 1.0) * largest

    def get_config(self):
        return {
            **super().get_config(),
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": initializers.serialize(self.beta_initializer),
            "gamma_initializer": initializers.serialize(self.gamma_initializer),
        }
