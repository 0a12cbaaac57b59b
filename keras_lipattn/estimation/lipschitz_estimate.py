"""What an attack on a Lipschitz constant finds."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzEstimate:
    """A lower estimate of a Lipschitz constant, not a certificate.

    The constant of the function is at least `value`, up to the rounding of the dtype it was
    computed in; how much larger it is, nothing here says.

    Args:
        value: `|J(point) direction| / |direction|`, as evaluated at the end.
        norm: Norm of inputs and outputs, `"l2"`, `"token"` or `"linf"`.
        point: One example, shape `(...)`.
        direction: The direction in which the function changes so fast there, shape `(...)`.
        steps: Steps of each ascent.
        seed: Seed of the search.
    """

    value: float
    norm: str
    point: np.ndarray
    direction: np.ndarray
    steps: int
    seed: int
