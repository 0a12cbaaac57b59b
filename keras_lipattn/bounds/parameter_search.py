"""A small deterministic search for the free parameters of a theorem."""

import itertools
import typing

import numpy as np
import numpy.typing as npt


def search(
    objective: typing.Callable[..., float],
    axes: typing.Sequence[npt.NDArray[np.float64]],
    *,
    rounds: int = 7,
) -> tuple[float, ...]:
    """Grid search followed by steps of shrinking size to better neighbours.

    Soundness never depends on what is found: every parameter gives a valid bound.

    Args:
        objective: function of as many floats as there are axes; `inf` where not valid.
        axes: one increasing, evenly spaced array of candidates per parameter.
        rounds: number of times the step is halved.

    Returns:
        The best parameters, a tuple of floats inside the ranges of `axes`.
    """
    best_value, best = np.inf, tuple(float(axis[0]) for axis in axes)
    for point in itertools.product(*axes):
        value = objective(*point)
        if value < best_value:
            best_value, best = value, tuple(float(p) for p in point)
    # The objectives are maxima with ridges: steps along single axes would get stuck on them.
    moves = [
        np.array(move) for move in itertools.product((-1, 0, 1), repeat=len(axes)) if any(move)
    ]
    steps = np.array([axis[1] - axis[0] for axis in axes]) / 2.0
    ends = np.array([(axis[0], axis[-1]) for axis in axes])
    for _ in range(rounds):
        improved = True
        while improved:
            improved = False
            for move in moves:
                point = tuple(np.clip(best + move * steps, ends[:, 0], ends[:, 1]).tolist())
                value = objective(*point)
                if value < best_value:
                    best_value, best, improved = value, point, True
        steps = steps / 2.0
    return best
