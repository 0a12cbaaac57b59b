"""A last dense layer whose classes have vectors of length 1."""

import keras

from keras_lipattn.layers._dense import Folded, FullPrecisionDense
from keras_lipattn.linalg.cholesky import SMALLEST_SCALE


@keras.saving.register_keras_serializable(package="keras_lipattn")
class NormalizedDense(FullPrecisionDense):
    """`keras.layers.Dense` with columns of its kernel of 2-norm 1: last-layer normalization.

    Each logit has the Lipschitz constant 1 in the 2-norm, and the difference of two logits at most
    2. This says nothing of all logits side by side, whose constant is at most the square root of
    `units`: a certificate uses the constants of the pairs, `certify(model).pairwise_constants`.
    A column without entries of at least 1e-20 counts as zero.

    Args:
        units: Number of classes.
        activation: Activation function; the certified constant includes its own.
        use_bias: Whether to add a bias.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the weight before it is normalized.
        bias_regularizer: Regularizer of the bias.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint of the weight before it is normalized.
        bias_constraint: Constraint of the bias.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    Raises:
        ValueError: For `units` that are not positive, or an input without axes.

    Example:

    >>> inputs = keras.Input((64,))
    >>> model = keras.Model(inputs, NormalizedDense(3)(inputs))
    >>> pairs = certify(model).pairwise_constants
    >>> max(max(row) for row in pairs) <= 2.0 + 1e-6
    True

    Reference:
        Singla, Singla, Feizi, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100",
        ICLR 2022.
    """

    def fold(self, kernels, factors, xp):
        (kernel,) = kernels
        # Scaled first, so that squares neither overflow nor vanish.
        largest = xp.max(xp.abs(kernel), axis=0, keepdims=True)
        vanishes = largest < SMALLEST_SCALE
        scaled = xp.where(vanishes, xp.zeros_like(kernel), kernel)
        scaled = scaled / xp.where(vanishes, xp.ones_like(largest), largest)
        squares = xp.sum(xp.square(scaled), axis=0, keepdims=True)
        kernel = scaled / xp.sqrt(xp.where(squares > 0.0, squares, xp.ones_like(squares)))
        return Folded(None, kernel, 1.0, kernel)
