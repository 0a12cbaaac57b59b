"""Explicit Runge-Kutta steps for `dx/dt = f(t, x) - decay x`, decay solved exactly."""

import dataclasses
import math

import numpy as np

# Nodes `c`, rows of `a` and weights `b`. Nothing is negative, or `comparison` would not be a bound.
TABLEAUS = {
    "euler": ((0.0,), ((),), (1.0,)),
    "midpoint": ((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "rk4": (
        (0.0, 1 / 2, 1 / 2, 1.0),
        ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


@dataclasses.dataclass(frozen=True)
class Combination:
    """`own * x + sum_j slopes[j] * slope_j`."""

    own: float
    slopes: tuple[float, ...]

    def __call__(self, x, slopes):
        total = x if self.own == 1.0 else self.own * x
        for coefficient, slope in zip(self.slopes, slopes, strict=True):
            if coefficient != 0.0:
                total = total + coefficient * slope
        return total

    def absolute(self):
        return Combination(abs(self.own), tuple(map(abs, self.slopes)))


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a method, its numbers as they run.

    Args:
        nodes: Times of the stages, as parts of the step.
        stages: How each stage is made from the state and the slopes before it.
        end: How the new state is made.
    """

    nodes: tuple[float, ...]
    stages: tuple[Combination, ...]
    end: Combination

    def __call__(self, x, fields):
        """The state after the step; `fields[i]` is the vector field at the time of stage `i`."""
        slopes = []
        for stage, field in zip(self.stages, fields, strict=True):
            slopes.append(field(stage(x, slopes)))
        return self.end(x, slopes)

    def constant(self, constants):
        """Lipschitz constant of the step, from those of its fields (docs/theory.md, section 11).

        It is the step itself, run on the comparison equation `dz/dt = L(t) z - decay z`.
        """
        absolute = Step(
            self.nodes, tuple(stage.absolute() for stage in self.stages), self.end.absolute()
        )
        return absolute(1.0, [lambda z, bound=bound: bound * z for bound in constants])


def runge_kutta(method, size, decay, dtype):
    """One step of size `size`, which may be negative.

    Args:
        method: Name in `TABLEAUS`.
        size: Size of the step.
        decay: Decay, at least 0.
        dtype: Dtype of the state: coefficients are rounded to it, as they are when they run.

    Returns:
        A `Step`.
    """
    nodes, rows, weights = TABLEAUS[method]

    def combination(end, coefficients):
        return Combination(
            rounded(exp(-decay * end * size), dtype),
            tuple(
                rounded(size * coefficient * exp(-decay * (end - node) * size), dtype)
                for coefficient, node in zip(coefficients, nodes, strict=False)
            ),
        )

    stages = tuple(combination(node, row) for node, row in zip(nodes, rows, strict=True))
    return Step(nodes, stages, combination(1.0, weights))


def rounded(number, dtype):
    """A float as it is in a product with a tensor of this dtype."""
    with np.errstate(over="ignore"):
        return float(np.asarray(number, dtype))


def exp(exponent):
    """The exponential, `inf` where it is larger than the largest float64."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
