"""Base of the dense layers: a kernel made from a weight, then bias and activation."""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import activations, initializers, ops, regularizers
from keras import constraints as keras_constraints

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn.bounds import layer_constants
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._norms import ExactNorms
from keras_lipattn.layers._precision import is_finite
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer
from keras_lipattn.linalg.exact import SAFETY


class Folded(NamedTuple):
    """The kernel before its cap, the factor of the cap, and their product."""

    projection: None
    kernel: Any
    factor: Any
    output: Any


class DenseLayer(LipschitzLayer):
    """`keras.layers.Dense` with another kernel than its weight, which `fold` makes.

    Args:
        units: Dimension of the output.
        activation: Activation function; the certified constant includes its own.
        use_bias: Whether to add a bias.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the kernel.
        bias_regularizer: Regularizer of the bias.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint of the kernel.
        bias_constraint: Constraint of the bias.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        require_positive_integer("units", units)
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.supports_masking = True
        self.units = units
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = keras_constraints.get(kernel_constraint)
        self.bias_constraint = keras_constraints.get(bias_constraint)

    def build(self, input_shape):
        shape, operator_shape = self.kernel_shapes(input_shape)
        self.kernel = self.add_kernel(
            "kernel",
            shape,
            operator_shape,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            autocast=self.kernel_dtype == self.compute_dtype,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.add_running_state()

    def kernel_shapes(self, input_shape):
        """Shape of the weight, and of the matrices whose norms the cap needs, if it is another."""
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "The input must have a batch axis and a static last axis. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        return (input_shape[-1], self.units), None

    def call(self, inputs, training=None):
        return self.call_with_weights(self.effective_weights(training=bool(training)), inputs)

    def call_with_weights(self, weights, inputs):
        """The call with given `EffectiveWeights`."""
        kernel = ops.cast(weights.output, self.kernel_dtype)
        output = self.linear(ops.cast(inputs, self.kernel_dtype), kernel)
        output = ops.cast(output, self.compute_dtype)
        if self.bias is not None:
            output = output + ops.cast(self.bias, self.compute_dtype)
        return self.activation(output)

    def linear(self, inputs, kernel):
        """The product of the input with the kernel, a matrix."""
        return ops.matmul(inputs, kernel)

    @property
    def kernel_dtype(self):
        """Dtype of the kernel that runs, and of its product with the input."""
        return self.compute_dtype

    def matrices(self, weights, norm, xp):
        # The norm of a scaled matrix is the scaled norm: one vector serves cap and bound.
        return {} if norm == "linf" else {"kernel": weights.kernel}

    def bound(self, weights, norms, norm, tokens, mask, xp):
        constant, _ = activation_constant(self.activation, norm)
        if not math.isfinite(constant):
            return math.inf
        if norm == "linf":
            kernel = xp.max(xp.sum(xp.abs(weights.kernel), axis=0))
        else:
            kernel = norms["kernel"]
        return constant * kernel * weights.factor

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant at inference, for the weights now loaded.

        Args:
            sequence_length: Ignored: tokens do not meet in this layer.
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry).
            mask: Ignored for the same reason.

        Returns:
            A `LipschitzBound` of kind `"certified"`; `inf` with the reason when the kernel is not
            finite or the activation's constant is unknown.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        self.mask_and_length(sequence_length, norm, mask)
        kernel = self.host_weights().weights().output.astype(np.float64)
        _, reason = activation_constant(self.activation, norm)
        if not np.isfinite(kernel).all():
            reason = "the kernel holds NaN or infinite entries"
        elif not is_finite(self.bias, self.compute_dtype):
            reason = "the bias holds NaN or infinite entries"
        value = math.inf
        if not reason:
            value = SAFETY * self.exact_bound(kernel, norm)
        return LipschitzBound(
            value=value, norm=norm, kind="certified", theorem="operator norm", reason=reason
        )

    def exact_bound(self, kernel, norm):
        """The constant of the layer with a kernel that runs, in float64 on the host."""
        folded = Folded(None, kernel, 1.0, kernel)
        return self._bound(folded, ExactNorms(), norm, None, None, np)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras_constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras_constraints.serialize(self.bias_constraint),
        }


class FullPrecisionDense(DenseLayer):
    """A dense layer whose kernel keeps its precision under a mixed policy.

    The kernel is computed from its weight in float32, and so is its product with the input. Its
    properties would not survive a rounding to half precision.
    """

    @property
    def kernel_dtype(self):
        return self._norm_dtype

    def _graph_kernels(self):
        return [ops.cast(kernel, self._norm_dtype) for kernel in self.kernels]

    def host_kernels(self):
        kernel = ops.convert_to_numpy(ops.convert_to_tensor(self.kernel))
        return [kernel.astype(np.float64)]

    def _rounded(self, matrix, xp):
        return matrix


def activation_constant(function, norm):
    """Constant of a `keras.activations` function in `norm`, and the reason when it is `inf`.

    Only the functions of Keras themselves count, with their default arguments: another function may
    have the same name.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        known = keras.activations.get(name)
    except ValueError:
        known = None
    if known is not function:
        return float("inf"), f"{name!r} is not an activation of Keras: its constant is unknown"
    if name in layer_constants.UNBOUNDED_ACTIVATIONS:
        return float("inf"), layer_constants.UNBOUNDED_ACTIVATIONS[name]
    try:
        return layer_constants.activation_constant(name, norm), ""
    except KeyError:
        return float("inf"), f"the activation {name!r} has no known Lipschitz constant"
