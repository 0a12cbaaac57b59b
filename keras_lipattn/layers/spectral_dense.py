"""A dense layer whose kernel is capped in operator norm."""

import keras

from keras_lipattn._arguments import require_positive
from keras_lipattn.layers._dense import DenseLayer, Folded


@keras.saving.register_keras_serializable(package="keras_lipattn")
class SpectralDense(DenseLayer):
    """`keras.layers.Dense` with the spectral norm of its kernel capped, at inference too.

    The kernel that runs is `kernel * min(1, spectral_norm / ||kernel||)`: shrunk when it is too
    large, never enlarged, with the gradient flowing through the norm. In training the norm is a
    running estimate; at inference it is an upper bound, so the cap holds for whatever weights are
    loaded.

    Args:
        units: Dimension of the output.
        activation: Activation function; the certified constant includes its own.
        use_bias: Whether to add a bias.
        spectral_norm: Largest spectral norm of the kernel; `None` for no cap.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the kernel.
        bias_regularizer: Regularizer of the bias.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint of the kernel.
        bias_constraint: Constraint of the bias.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    Raises:
        ValueError: For `units` or `spectral_norm` which are not positive, or an input without axes.

    Example:

    >>> layer = SpectralDense(32, spectral_norm=1.0)
    >>> keras.ops.shape(layer(keras.random.normal((4, 16))))
    (4, 32)
    >>> layer.lipschitz().value <= 1.0
    True

    Reference:
        Gouk, Frank, Pfahringer, Cree, "Regularisation of neural networks by enforcing Lipschitz
        continuity", 2021 (the projection, here as a reparametrization).
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        spectral_norm: float | None = 1.0,
        *args,
        **kwargs,
    ):
        require_positive("spectral_norm", spectral_norm)
        super().__init__(units, activation, use_bias, *args, **kwargs)
        self.spectral_norm = spectral_norm

    def fold(self, kernels, factors, xp):
        (kernel,), (factor,) = kernels, factors
        return Folded(None, kernel, factor, kernel * factor)

    def get_config(self):
        return {**super().get_config(), "spectral_norm": self.spectral_norm}
