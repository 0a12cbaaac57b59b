"""Explicit Runge-Kutta steps for `dx/dt = f(t, x) - decay x`, with the decay solved exactly."""

import dataclasses
import math

import numpy as np

# Nodes `c`, rows of `a` and weights `b` of the Butcher tableaus.
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
    """The linear combination `state * x + sum_j slopes[j] * slope_j`."""

    state: float
    slopes: tuple[float, ...]

    def __call__(self, x, slopes):
        total = x if self.state == 1.0 else self.state * x
        for coefficient, slope in zip(self.slopes, slopes, strict=True):
            if coefficient != 0.0:
                total = total + coefficient * slope
        return total

    def absolute(self):
        return Combination(abs(self.state), tuple(map(abs, self.slopes)))


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a method, with its coefficients rounded to the dtype of the state.

    Args:
        nodes: Times of the stages, as fractions of the step.
        stages: For each stage, the combination of the state and the earlier slopes.
        end: The combination that gives the new state.
    """

    nodes: tuple[float, ...]
    stages: tuple[Combination, ...]
    end: Combination

    def __call__(self, x, fields):
        """State after the step, where `fields[i]` is the vector field at the time of stage `i`."""
        slopes = []
        for stage, field in zip(self.stages, fields, strict=True):
            slopes.append(field(stage(x, slopes)))
        return self.end(x, slopes)

    def constant(self, constants):
        """Lipschitz constant of the step, given those of its fields (docs/theory.md, Section 11).

        It is the result of the step for the comparison equation `dz/dt = L(t) z - decay z`, with
        the absolute values of all coefficients.
        """
        absolute = Step(
            self.nodes, tuple(stage.absolute() for stage in self.stages), self.end.absolute()
        )
        return absolute(1.0, [lambda z, bound=bound: bound * z for bound in constants])


def make_step(method, size, decay, dtype):
    """Step of a method for a given step size.

    Args:
        method: Name in `TABLEAUS`.
        size: Step size, which may be negative.
        decay: Rate of decay, at least 0.
        dtype: Dtype of the state, to which the coefficients are rounded.

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
    """The float `number`, rounded to `dtype`."""
    with np.errstate(over="ignore"):
        return float(np.asarray(number, dtype))


def exp(exponent):
    """The exponential of a float, or `inf` if it is larger than the largest float64."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
