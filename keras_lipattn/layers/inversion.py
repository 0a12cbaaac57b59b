"""Results of inverses and of log-determinants, and the error of an inverse that was not found."""

from typing import Any, NamedTuple


class Inversion(NamedTuple):
    """Result of `inverse`: the solution of `layer(x) = y`, and how accurate it is.

    Attributes:
        solution: Tensor of the shape of `y`. Derivatives flow through it by the implicit function
            theorem.
        residual: Norm of `y - layer(x)`, `(B,)`, at the last point `x` of the iteration. The
            solution is one step further. For several layers, the largest of their residuals.
        error_bound: Upper bound of the distance from `solution` to the exact inverse, `(B,)`:
            `coefficient / (1 - coefficient) * residual`. Certified up to the rounding error of the
            residual.
        steps: Number of evaluations of the branch, `(B,)`, int32. For several layers, their sum.
        converged: Whether the tolerance was reached, `(B,)`. If not, `solution` is NaN.

    Example:

    >>> block = keras_lipattn.InvertibleResidual(keras_lipattn.SpectralDense(4), coefficient=0.5)
    >>> y = block(keras.random.normal((2, 4)))
    >>> inversion = block.inverse(y)
    >>> bool(np.all(inversion.converged)), bool(np.all(inversion.error_bound < 1e-5))
    (True, True)
    """

    solution: Any
    residual: Any
    error_bound: Any
    steps: Any
    converged: Any


class LogDeterminant(NamedTuple):
    """Result of `log_det_jacobian`: `log |det J|` of each example, and its truncation error.

    Attributes:
        value: Tensor `(B,)`. Derivatives flow through it.
        truncation_error: Certified upper bound of `|E[value] - log |det J||`, `(B,)`, in real
            arithmetic: the largest possible sum of the omitted terms. Zero for the exact and the
            unbiased method.

    Example:

    >>> block = keras_lipattn.InvertibleResidual(keras_lipattn.SpectralDense(4), coefficient=0.5)
    >>> x = keras.random.normal((2, 4))
    >>> block.build((None, 4))
    >>> exact = block.log_det_jacobian(x)
    >>> series = block.log_det_jacobian(x, method="series", num_terms=4)
    >>> error = np.abs(series.value - exact.value)
    >>> bool(np.all(error <= series.truncation_error + 1e-5))
    True
    """

    value: Any
    truncation_error: Any


class InversionError(ArithmeticError):
    """An inverse did not reach its tolerance. The message states the residual and what to try.

    Example:

    >>> block = keras_lipattn.InvertibleResidual(keras_lipattn.SpectralDense(4), coefficient=0.5)
    >>> y = block(keras.random.normal((2, 4)))
    >>> try:
    ...     inversion = block.inverse(y, max_steps=1)
    ... except keras_lipattn.layers.InversionError:
    ...     print("more steps are needed")
    more steps are needed
    """
