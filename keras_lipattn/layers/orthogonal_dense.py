"""A dense layer whose kernel has orthonormal rows or columns."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._backend import freezes_variables
from keras_lipattn.layers._dense import Folded, FullPrecisionDense, activation_constant
from keras_lipattn.layers._norms import RunningNorms, WeightCache
from keras_lipattn.linalg.cholesky import exact_orthonormal, orthonormal
from keras_lipattn.linalg.exact import SAFETY
from keras_lipattn.linalg.gram import gram_upper_bound

# Singular values this close to 1 show that the kernel is far from singular, so that roundings of
# float64 do not show in its factor.
_ISOMETRY = 1e-6


@keras.saving.register_keras_serializable(package="keras_lipattn")
class OrthogonalDense(FullPrecisionDense):
    """`keras.layers.Dense` with orthonormal columns of its kernel, or rows if these are fewer.

    The kernel that runs is the orthonormal factor `Q` of the weight `kernel = Q R`, where `R` is
    upper triangular with a positive diagonal (of the transpose, for more units than features).
    All its singular values are 1: the Lipschitz constant in the 2-norm is 1, and no direction
    shrinks, except that directions are dropped if there are fewer units than features. An
    orthonormal weight runs as it is.

    In training `Q` is computed in each step, in float32, and the gradient flows through it. At
    inference it is computed in float64 once and remembered until the weight changes, which takes
    twice the memory of the weight. The `Q` of a singular weight has singular values below 1. The
    certificate measures the `Q` that runs.

    Under a mixed policy `Q` and its product with the input stay in float32: rounded to half
    precision, `Q` would not be orthonormal.

    Args:
        units: Dimension of the output.
        activation: Activation function; the certified constant includes its own.
        use_bias: Whether to add a bias.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the weight that `Q` is made from.
        bias_regularizer: Regularizer of the bias.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint of the weight that `Q` is made from.
        bias_constraint: Constraint of the bias.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    Raises:
        ValueError: For `units` that are not positive, or an input without axes.

    Example:

    >>> layer = OrthogonalDense(32)
    >>> keras.ops.shape(layer(keras.random.normal((4, 64))))
    (4, 32)
    >>> abs(layer.lipschitz().value - 1.0) < 1e-6
    True

    Reference:
        Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019 (why kernels
        should be orthonormal); `keras_lipattn.linalg.cholesky` (the factorization).
    """

    def __init__(self, units, activation=None, use_bias=True, *args, **kwargs):
        if not args:
            kwargs.setdefault("kernel_initializer", "orthogonal")
        super().__init__(units, activation, use_bias, *args, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        shape = tuple(self.kernel.shape)
        self._factor = WeightCache([shape], shape, self._norm_dtype)

    def fold(self, kernels, factors, xp):
        (kernel,) = kernels
        factor = exact_orthonormal(kernel) if xp is np else orthonormal(kernel)
        return Folded(None, factor, 1.0, factor)

    def _fold(self, kernels, norms, xp):
        if xp is np or isinstance(norms, RunningNorms):
            return self.fold(kernels, [1.0], xp)
        if freezes_variables():
            import tensorflow as tf

            # The weights become constants, so their factor may, and no variable can be written.
            with tf.init_scope():
                exact = self._exact_factor()
            factor = ops.convert_to_tensor(exact, self._norm_dtype)
        else:
            factor = self._factor.select(kernels, _bounded_factor, _double_factor)
        return Folded(None, factor, 1.0, factor)

    def largest_constant(self, norm):
        """The constant without the activation for any factor, whatever its roundings."""
        size = 1.0 + _ISOMETRY
        return size * math.sqrt(self.kernel.shape[0]) if norm == "linf" else size

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        bound = super().lipschitz(sequence_length, norm, mask)
        if not bound.is_finite or self.caps_are_exact():
            return bound
        constant, _ = activation_constant(self.activation, norm)
        value = SAFETY * max(bound.value, constant * self.largest_constant(norm))
        return dataclasses.replace(bound, value=value)

    # Remembered -----------------------------------------------------------------------------

    def caps_are_exact(self):
        if self.is_condensed:
            return True
        exact = self._exact_factor()
        remembered = self._factor.remembered(self._graph_kernels())
        if remembered is not None:
            return bool(np.allclose(remembered, exact, rtol=0.0, atol=_ISOMETRY))
        if keras.backend.backend() != "tensorflow" or not np.isfinite(exact).all():
            return False
        exact = exact if exact.shape[0] >= exact.shape[1] else exact.T
        return bool(np.linalg.norm(exact.T @ exact - np.eye(exact.shape[1])) <= _ISOMETRY)

    def condense(self):
        """Remembers the orthonormal kernel of the weight now loaded, so that inference is fast.

        Without it the first inference after the weight changed computes it, and on backends other
        than TensorFlow every one.

        Raises:
            ValueError: If the layer is not built.
        """
        self._require_built("condensing it")
        self._factor.fill(self._graph_kernels(), self._exact_factor())

    def _exact_factor(self) -> Any:
        return exact_orthonormal(self.host_kernels()[0])


def _double_factor(kernel) -> Any:
    """The factor of a kernel in float64, as on the host."""
    return orthonormal(kernel, passes=2)


def _bounded_factor(kernel):
    """The factor in the dtype of the kernel, of norm at most 1 for all roundings."""
    factor = orthonormal(kernel, passes=2)
    return factor / ops.maximum(gram_upper_bound(factor), 1.0)
