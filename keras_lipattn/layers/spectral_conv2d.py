"""A convolution whose operator norm is capped."""

import math

import keras
from keras import ops

from keras_lipattn._arguments import as_tuple, require_positive
from keras_lipattn.bounds import layer_constants
from keras_lipattn.bounds.convolution_symbol import CAP_GRID, grid_slack, symbol, symbol_shape
from keras_lipattn.layers._dense import DenseLayer, Folded, activation_constant


@keras.saving.register_keras_serializable(package="keras_lipattn")
class SpectralConv2D(DenseLayer):
    """`keras.layers.Conv2D` with its operator norm capped, at inference too.

    The norm is that of the convolution as it runs, with its stride and zero padding, not that of
    the kernel as a matrix. It is bounded from above for all sizes of images by the largest norm of
    the symbol of the kernel over a grid of frequencies, times at most 1.04 for those in between.
    The kernel that runs is `kernel * min(1, spectral_norm / bound)`. The certificate is sharper
    than the cap, so it takes back most of this factor.

    `OrthogonalDense` after `SpaceToDepth` is an isometry, for kernels as large as their stride.

    Args:
        filters: Number of channels of the output.
        kernel_size: Sides of the kernel, an integer or a pair.
        strides: Strides, an integer or a pair.
        padding: `"valid"` or `"same"`, with zeros.
        activation: Activation function; the certified constant includes its own.
        use_bias: Whether to add a bias.
        spectral_norm: Largest norm of the convolution; `None` for no cap.
        **kwargs: Initializers, regularizers and constraints as for `SpectralDense`, and arguments
            of `keras.layers.Layer`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, new_height, new_width,
    filters)`.

    Raises:
        ValueError: For sizes or `spectral_norm` which are not positive, another `padding`, or an
            input of another rank or with an unknown number of channels.

    Example:

    >>> layer = SpectralConv2D(8, 3, strides=2, padding="same", spectral_norm=1.0)
    >>> keras.ops.shape(layer(keras.random.normal((4, 16, 16, 3))))
    (4, 8, 8, 8)
    >>> layer.lipschitz().value <= 1.0
    True

    Reference:
        Sedghi, Gupta, Long, "The singular values of convolutional layers", ICLR 2019 (circular
        convolutions); `keras_lipattn.bounds.convolution_symbol` (strides, padding, all sizes).
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        activation=None,
        use_bias=True,
        spectral_norm: float | None = 1.0,
        **kwargs,
    ):
        require_positive("spectral_norm", spectral_norm)
        if padding not in ("valid", "same"):
            raise ValueError(f"`padding` must be 'valid' or 'same'. Received: padding={padding!r}")
        super().__init__(filters, activation, use_bias, **kwargs)
        self.kernel_size = _pair("kernel_size", kernel_size)
        self.strides = _pair("strides", strides)
        self.padding = padding
        self.spectral_norm = spectral_norm
        # Of Conv2D, for the rule of convolutions.
        self.dilation_rate = (1, 1)
        self.data_format = "channels_last"

    def kernel_shapes(self, input_shape):
        if len(input_shape) != 4 or input_shape[-1] is None:
            raise ValueError(
                "The input must have the shape (batch, height, width, channels) with a known "
                f"number of channels. Received: input_shape={tuple(input_shape)}"
            )
        shape = (*self.kernel_size, input_shape[-1], self.units)
        return shape, symbol_shape(shape, self.strides, CAP_GRID)

    def linear(self, inputs, kernel):
        kernel = ops.reshape(kernel, self.kernel.shape)
        return ops.conv(inputs, kernel, self.strides, self.padding, data_format="channels_last")

    def fold(self, kernels, factors, xp):
        (kernel,), (factor,) = kernels, factors
        return Folded(None, kernel, factor, kernel * factor)

    def matrices(self, weights, norm, xp):
        if norm == "l2":
            return self._operators([weights.kernel], xp)
        if norm == "token":
            return {"offsets": xp.reshape(weights.kernel, (-1, *self.kernel.shape[2:]))}
        return {}

    def bound(self, weights, norms, norm, tokens, mask, xp):
        constant, _ = activation_constant(self.activation, norm)
        if not math.isfinite(constant):
            return math.inf
        if norm == "linf":
            size = xp.max(xp.sum(xp.abs(weights.kernel), axis=(0, 1, 2)))
        elif norm == "token":
            size = xp.sum(norms["offsets"])
        else:
            size = self._largest(norms["kernel"], xp)
        return constant * size * weights.factor

    def exact_bound(self, kernel, norm):
        constant, _ = activation_constant(self.activation, norm)
        kernel = kernel.reshape(self.kernel.shape)
        return constant * layer_constants.convolution_constant(kernel, norm, strides=self.strides)

    def _operators(self, kernels, xp):
        (kernel,) = kernels
        return {"kernel": symbol(kernel, self.strides, CAP_GRID, xp)}

    def _cap_factors(self, kernels, norms, xp):
        if self.spectral_norm is None:
            return [1.0]
        found = norms.measure(lambda: self._operators(kernels, xp))
        norm = self._largest(found["kernel"], xp)
        shape = (math.prod(self.kernel.shape[:-1]), self.units)
        return [self._cap_factor(norm, self.spectral_norm, shape, xp)]

    def _largest(self, norms, xp):
        return xp.max(norms) * grid_slack(self.kernel_size, self.strides, CAP_GRID)

    def compute_output_shape(self, input_shape):
        sides = []
        for side, size, stride in zip(
            input_shape[1:3], self.kernel_size, self.strides, strict=True
        ):
            span = 1 if self.padding == "same" else size
            sides.append(None if side is None else (side - span) // stride + 1)
        return (input_shape[0], *sides, self.units)

    def get_config(self):
        config = super().get_config()
        filters = config.pop("units")
        return {
            **config,
            "filters": filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "spectral_norm": self.spectral_norm,
        }


def _pair(name, value):
    sides = as_tuple(name, value)
    if sides is None or len(sides) > 2 or min(sides) < 1:
        raise ValueError(
            f"`{name}` must be a positive integer or a pair of them. Received: {name}={value}"
        )
    return sides * 2 if len(sides) == 1 else sides
