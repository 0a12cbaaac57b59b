"""A convolution whose kernel is a rotation of shifted channels."""

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn.layers.orthogonal_dense import OrthogonalDense


@keras.saving.register_keras_serializable(package="keras_lipattn")
class OrthogonalConv2D(keras.layers.Layer):
    """A convolution that shifts groups of channels and then mixes them with an orthogonal kernel.

    The channels are split into `k * k` groups of nearly equal size for a kernel of side `k`. Each
    group moves by one of the offsets of the kernel, the first groups by the smallest ones, so that
    the image of a group is shifted and zeros come in at the border. Then `OrthogonalDense` mixes
    the channels of each pixel. As one convolution, its kernel has the entry `Q[i, o]` at the offset
    of channel `i` and zeros elsewhere. No length changes in the 2-norm, except that pixels leave at
    the border and directions are dropped if there are fewer filters than channels. So the Lipschitz
    constant is 1.

    One layer sees less than a free kernel, since each channel is read at one offset. Layers in a
    row, with orthogonal kernels between the shifts, are the block convolutions of Li et al. It
    takes `channels * filters` weights and products a pixel, where a free kernel takes `k * k` times
    as many. To down-sample, use `SpaceToDepth` and `OrthogonalDense`.

    Args:
        filters: Number of channels of the output.
        kernel_size: Side of the kernel, odd.
        activation: Activation function; the certified constant includes its own.
        use_bias: Whether to add a bias.
        kernel_initializer: Initializer of the kernel that mixes channels.
        bias_initializer: Initializer of the bias.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, height, width,
    filters)`.

    Raises:
        ValueError: If `filters` or `kernel_size` is not positive, `kernel_size` is even, or the
            input has another rank or an unknown number of channels.

    Example:

    >>> image = keras.Input((32, 32, 3))
    >>> x = OrthogonalDense(64)(SpaceToDepth(2)(image))
    >>> x = MaxMin()(OrthogonalConv2D(64)(x))
    >>> model = keras.Model(image, x)
    >>> abs(keras_lipattn.certify(model).total - 1.0) < 1e-6
    True

    Reference:
        Wu et al., "Shift: a zero FLOP, zero parameter alternative to spatial convolutions", CVPR
        2018; Li et al., "Preventing gradient attenuation in Lipschitz constrained convolutional
        networks", NeurIPS 2019 (orthogonal convolutions as products of shifts and projections).
    """

    def __init__(
        self,
        filters,
        kernel_size=3,
        activation=None,
        use_bias=True,
        kernel_initializer="orthogonal",
        bias_initializer="zeros",
        **kwargs,
    ):
        require_positive_integer("filters", filters, optional=False)
        require_positive_integer("kernel_size", kernel_size, optional=False)
        if kernel_size % 2 == 0:
            raise ValueError(
                "`kernel_size` must be odd, so that a pixel is in the middle of its kernel. "
                f"Received: kernel_size={kernel_size}"
            )
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_size = kernel_size
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape):
        if len(input_shape) != 4 or input_shape[-1] is None:
            raise ValueError(
                "The input must have the shape (batch, height, width, channels) with a known "
                f"number of channels. Received: input_shape={tuple(input_shape)}"
            )
        self._shifts = _one_offset_each(self.kernel_size, input_shape[-1])
        self._mix = OrthogonalDense(
            self.filters,
            self.activation,
            self.use_bias,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            dtype=self.dtype_policy,
            name="mix",
        )
        self._mix.build(input_shape)

    def call(self, inputs):
        shifts = ops.convert_to_tensor(self._shifts, inputs.dtype)
        shifted = ops.depthwise_conv(inputs, shifts, padding="same", data_format="channels_last")
        return self._mix(shifted)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.filters)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


def _one_offset_each(size: int, channels: int) -> np.ndarray:
    """A depthwise kernel `(size, size, channels, 1)` with a single one for each channel."""
    steps = np.arange(size) - size // 2
    distances = np.add.outer(steps**2, steps**2)
    offsets = np.argsort(distances, axis=None, kind="stable")
    chosen = offsets[np.arange(channels) * size**2 // channels]
    kernel = np.zeros((size * size, channels))
    kernel[chosen, np.arange(channels)] = 1.0
    return kernel.reshape(size, size, channels, 1)
