"""What an inverse returns."""

from typing import Any, NamedTuple


class Inversion(NamedTuple):
    """The solution of `layer(x) = y`, and how well it is known.

    Attributes:
        solution: Tensor of the shape of `y`. Derivatives flow through it, by the implicit function
            theorem.
        residual: Norm of `y - layer(x)`, `(B,)`, at the last point `x` of the iteration; the
            solution is one step ahead of it. Of several layers the largest.
        error_bound: Largest distance from `solution` to the true inverse, `(B,)`, that the residual
            leaves open: `coefficient / (1 - coefficient) * residual`. Certified but for the
            rounding of the residual itself.
        steps: Evaluations of the branch, `(B,)`, int32; of several layers the sum.
        converged: Whether the tolerance was reached, `(B,)`. Without it `solution` is NaN.
    """

    solution: Any
    residual: Any
    error_bound: Any
    steps: Any
    converged: Any
