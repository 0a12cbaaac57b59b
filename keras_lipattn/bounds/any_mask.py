"""Theorems 3.D and 3.E of docs/theory.md: 2-norm of the unit head, any mask with diagonal."""

import math
import typing

import numpy as np

from keras_lipattn.bounds.parameter_search import search
from keras_lipattn.bounds.row_functional import Floats, cells, diagonal_block, off_diagonal, points
from keras_lipattn.linalg import SAFETY


def any_mask_bound(n_keys: int, n_queries: int, *, count: int = 6000) -> float:
    """Upper bound of the 2-norm constant by the degrees of the mask.

    Args:
        n_keys: largest number of other keys a query sees, `>= 1`.
        n_queries: largest number of other queries that see a key, `>= 1`.
        count: number of cells of the final evaluation.

    Returns:
        A float, certified whatever parameters the search came up with.
    """
    return _bound(n_keys, n_queries, count, _entries_by_mass)


def weighted_bound(n_keys: float, n_queries: float, *, count: int = 6000) -> float:
    """Upper bound of the 2-norm constant where keys have weights, the own one being 1.

    Args:
        n_keys: largest weight of the other keys of a query together, `> 0`.
        n_queries: largest weight of a key for the other queries together.
        count: number of cells of the final evaluation.

    Returns:
        A float, certified whatever parameters the search came up with.
    """
    return _bound(n_keys, n_queries, count, _largest_entry)


def weighted_bounds(totals: typing.Sequence[float]) -> list[float]:
    """`weighted_bound(n, n)` for many `n` in order, each search beginning where one ended."""
    found, best = [], None
    for n in totals:
        axes = _AXES if best is None else [np.linspace(x - 0.4, x + 0.4, 3) for x in best]
        best = _parameters(n, n, _largest_entry, axes)
        found.append(_value(n, n, _largest_entry, best, 1500))
    return found


_AXES = np.linspace(math.log(0.001), 0.0, 12), np.linspace(-5.0, 4.0, 12)


def _bound(n_keys, n_queries, count, entries):
    best = _parameters(n_keys, n_queries, entries, _AXES)
    return _value(n_keys, n_queries, entries, best, count)


def _parameters(n_keys, n_queries, entries, axes):
    """Logarithms of `beta <= 1` and of the excess."""
    axes = [np.minimum(axes[0], 0.0), axes[1]]
    rough = points(n_keys, 160)
    return search(lambda *at: _squared_bound(n_keys, n_queries, at, rough, entries), axes)


def _value(n_keys, n_queries, entries, parameters, count):
    grid = cells(n_keys, count)
    return SAFETY * math.sqrt(_squared_bound(n_keys, n_queries, parameters, grid, entries))


def _entries_by_mass(high: Floats, beta: float) -> Floats:
    """Largest `kappa (1 + log(1 / kappa) / beta)` of an entry that is part of the mass."""
    mass = np.minimum(np.minimum(1.0, high), math.exp(beta - 1.0))
    return mass * (1.0 - np.log(mass) / beta)


def _largest_entry(high: Floats, beta: float) -> float:
    """The same for any `kappa` in (0, 1]: a light key may be near where the mass is small."""
    return math.exp(beta - 1.0) / beta


def _squared_bound(
    n_keys: float,
    n_queries: float,
    parameters: typing.Sequence[float],
    grid: tuple[Floats, Floats],
    entries: typing.Callable[[Floats, float], Floats | float],
) -> float:
    """Square of the bound; `B` is `1 + excess` times the smallest value the grid admits.

    `parameters` are the logarithms of `beta` and of the excess.
    """
    beta, excess = (math.exp(parameter) for parameter in parameters)
    low, high = grid
    load = off_diagonal(high, n_keys, beta) * entries(high, beta) / (1.0 + low) ** 2
    scale = (1.0 + excess) * load.max()
    row = diagonal_block(low, high, n_keys) ** 2 / (1.0 - load / scale)
    return float(row.max() + scale * n_queries)
