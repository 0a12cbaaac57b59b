"""Theorem 3.D of docs/theory.md: 2-norm of the unit head, any mask with diagonal."""

import math

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
    axes = np.linspace(math.log(0.001), 0.0, 12), np.linspace(-5.0, 4.0, 12)
    rough = points(n_keys, 160)
    log_beta, log_excess = search(
        lambda *point: _squared_bound(
            n_keys, n_queries, math.exp(point[0]), math.exp(point[1]), rough
        ),
        axes,
    )
    square = _squared_bound(
        n_keys, n_queries, math.exp(log_beta), math.exp(log_excess), cells(n_keys, count)
    )
    return SAFETY * math.sqrt(square)


def _squared_bound(
    n_keys: int, n_queries: int, beta: float, excess: float, grid: tuple[Floats, Floats]
) -> float:
    """Square of the bound; `B` is `1 + excess` times the smallest value the grid admits."""
    low, high = grid
    mass = np.minimum(np.minimum(1.0, high), math.exp(beta - 1.0))
    entry = mass * (1.0 - np.log(mass) / beta)
    load = off_diagonal(high, n_keys, beta) * entry / (1.0 + low) ** 2
    scale = (1.0 + excess) * load.max()
    row = diagonal_block(low, high, n_keys) ** 2 / (1.0 - load / scale)
    return float(row.max() + scale * n_queries)
