"""Theorem 3.B of docs/theory.md: 2-norm of the unit head, every token sees every token."""

import math

import numpy as np

from keras_lipattn.bounds.column_majorant import SPLITS, majorant_table
from keras_lipattn.bounds.parameter_search import search
from keras_lipattn.bounds.row_functional import Floats, cells, diagonal_block, off_diagonal, points
from keras_lipattn.linalg import SAFETY


def full_mask_bound(tokens: int, *, count: int = 6000) -> float:
    """Upper bound of the 2-norm constant for `tokens >= 2` and the full mask.

    Args:
        tokens: number of tokens `N`.
        count: number of cells of the final evaluation.

    Returns:
        A float, certified whatever parameters the search came up with.
    """
    n = tokens - 1
    axes = np.linspace(math.log(0.005), 0.0, 12), np.linspace(-4.0, 4.0, 12)
    rough = points(n, 160)
    log_beta, log_excess = search(
        lambda *point: _squared_bound(n, math.exp(point[0]), math.exp(point[1]), rough), axes
    )
    square = _squared_bound(n, math.exp(log_beta), math.exp(log_excess), cells(n, count))
    return SAFETY * math.sqrt(square)


def _squared_bound(n: int, beta: float, excess: float, grid: tuple[Floats, Floats]) -> float:
    """Square of the bound; `B` is `1 + excess` times the smallest value the grid admits."""
    low, high = grid
    load = off_diagonal(high, n, beta) / (1.0 + low) ** 1.5
    scale = (1.0 + excess) * load.max()
    lines = SPLITS[:, None] * high + majorant_table(beta)[:, None] * math.sqrt(n)
    row = diagonal_block(low, high, n) ** 2 / (1.0 - load / scale)
    return float((row + scale * lines.min(axis=0)).max())
