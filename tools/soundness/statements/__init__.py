"""Numerical attacks on single statements of docs/theory.md, in numpy.

Each module of this package has a list `STATEMENTS`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


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
