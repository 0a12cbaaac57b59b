"""A dense layer whose kernel is capped in operator norm."""

import math
from typing import Any

import keras
import numpy as np
from keras import activations, initializers, ops, regularizers
from keras import constraints as keras_constraints

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._activation import activation_constant
from keras_lipattn.layers._arguments import (
    require_norm,
    require_positive,
    require_positive_integer,
)
from keras_lipattn.layers._as_run import is_finite_as_run
from keras_lipattn.layers._operator_norms import ExactNorms, GramNorms, quiet
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer
from keras_lipattn.linalg.exact import SAFETY


@keras.saving.register_keras_serializable(package="keras_lipattn")
class SpectralDense(LipschitzLayer):
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
        continuity", 2021 (the projection, here as a reparametrisation).
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        spectral_norm: float | None = 1.0,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        require_positive_integer("units", units)
        require_positive("spectral_norm", spectral_norm)
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.supports_masking = True
        self.units = units
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.spectral_norm = spectral_norm
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = keras_constraints.get(kernel_constraint)
        self.bias_constraint = keras_constraints.get(bias_constraint)

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "The input must have a batch axis and a static last axis. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.units),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
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
        self._add_running_state()

    def call(self, inputs, training=None):
        if self._condensed is not None:
            kernel = self._condensed.tensor()
        else:
            kernel = self._call_kernel(bool(training))
        output = ops.matmul(inputs, ops.cast(kernel, self.compute_dtype))
        if self.bias is not None:
            output = output + ops.cast(self.bias, self.compute_dtype)
        return self.activation(output)

    def _call_kernel(self, training):
        kernels = self._graph_kernels()
        norms = self._norms_for(kernels, training)
        kernel = self._capped(kernels, norms, ops)
        if training and self._tracking is not None:
            # The norm of a scaled matrix is the scaled norm: the same vector serves both.
            (raw,) = kernels
            factor = self._shrinkage(kernels, norms, ops)
            norm = self._tracking.norm
            # Without a constant of the activation there is nothing that a penalty could lower.
            finite = math.isfinite(activation_constant(self.activation, norm)[0])
            self._record(self._bound(raw, norms, norm, ops) * factor, penalize=finite)
        if training and norms is not None:
            norms.commit()
        return kernel

    def _kernels(self):
        return [self.kernel]

    def _norm_shapes(self):
        return {"kernel": tuple(self.kernel.shape)}

    def _capped_norms(self):
        return [] if self.spectral_norm is None else ["kernel"]

    def _request_norms(self, kernels, norms, names, xp):
        for name in names:
            norms(name, kernels[0])

    def _shrinkage(self, kernels, norms, xp):
        if self.spectral_norm is None:
            return 1.0
        norm = norms("kernel", kernels[0])
        return self._cap_factor(norm, self.spectral_norm, self.kernel.shape, xp)

    def _capped(self, kernels, norms, xp):
        return kernels[0] * self._shrinkage(kernels, norms, xp)

    def _bound(self, kernel, norms, norm, xp):
        """Constant of `x -> activation(x kernel)`, given norms of the kernel."""
        constant, _ = activation_constant(self.activation, norm)
        if norm == "linf":
            return constant * xp.max(xp.sum(xp.abs(kernel), axis=0))
        return constant * norms("kernel", kernel)

    def _condense(self):
        return _CondensedDense(self)

    def _hold(self, mask):
        return _HeldDense(self._call_kernel(training=False))

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant at inference, for the weights now loaded.

        Args:
            sequence_length: Ignored: tokens do not meet in this layer.
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry).
            mask: Ignored, likewise.

        Returns:
            A `LipschitzBound` of kind `"certified"`; `inf` with the reason when the kernel is not
            finite or the activation's constant is unknown.

        Raises:
            ValueError: If the layer is not built, or `norm` is unknown.
        """
        self._require_built("asking for its Lipschitz constant")
        require_norm("norm", norm)
        kernel = (self._condensed or _CondensedDense(self)).kernel.astype(np.float64)
        _, reason = activation_constant(self.activation, norm)
        if not np.isfinite(kernel).all():
            reason = "the kernel holds NaN or infinite entries"
        elif not is_finite_as_run(self.bias, self.compute_dtype):
            reason = "the bias holds NaN or infinite entries"
        value = math.inf if reason else SAFETY * self._bound(kernel, ExactNorms(), norm, np)
        return LipschitzBound(
            value=value, norm=norm, kind="certified", theorem="operator norm", reason=reason
        )

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        if self._condensed is not None:
            return self.lipschitz(sequence_length, norm, mask).value
        kernels = self._graph_kernels()
        norms = self._norms_for(kernels, training=False)
        (raw,) = kernels
        return self._bound(raw, GramNorms(), norm, ops) * self._shrinkage(kernels, norms, ops)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "spectral_norm": self.spectral_norm,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras_constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras_constraints.serialize(self.bias_constraint),
        }


class _CondensedDense:
    """The kernel as it runs, capped with the exact norm on the host and rounded once."""

    def __init__(self, layer):
        self._dtype = layer._norm_dtype
        with quiet():
            kernel = layer._capped(layer._host_kernels(), ExactNorms(), np).astype(self._dtype)
            self.kernel = layer._rounded(kernel, np).astype(self._dtype)
        self.variables = []

    def materialize(self):
        self.variables = [
            keras.Variable(
                self.kernel,
                dtype=self._dtype,
                trainable=False,
                autocast=False,
                name="condensed_kernel",
            )
        ]

    def tensor(self):
        return self.variables[0].value


class _HeldDense:
    """The kernel of one call, for many."""

    def __init__(self, kernel):
        self._kernel = kernel

    def tensor(self):
        return self._kernel
