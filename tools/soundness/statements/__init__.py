"""Numerical attacks on single statements of docs/theory.md, in numpy.

Each module of this package has a list `STATEMENTS`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

_STEPS = 30
Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement and an attack on it.

    Args:
        name: what is printed.
        ratios: a function of a generator of random numbers and a count. It returns about so many
            ratios of a value that was found to the bound of the statement.
    """

    name: str
    ratios: Callable[[np.random.Generator, int], np.ndarray]


def climb(
    rng: np.random.Generator, start: Arrays, value: Callable[..., np.ndarray], steps: int = _STEPS
) -> np.ndarray:
    """Largest values found by random steps that are taken where they help; first axis is a batch.

    `value` projects its arguments onto what is legal.
    """
    best = value(*start)
    size = np.full(len(best), 0.5)
    for _ in range(steps):
        wide = [size.reshape(-1, *[1] * (part.ndim - 1)) for part in start]
        tried = tuple(
            part + step * rng.normal(size=part.shape)
            for part, step in zip(start, wide, strict=True)
        )
        found = value(*tried)
        better = found > best
        best = np.where(better, found, best)
        start = tuple(
            np.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old)
            for old, new in zip(start, tried, strict=True)
        )
        size = np.clip(size * np.where(better, 1.5, 0.8), 1e-3, 2.0)
    return best
