"""Theorem 3.C of docs/theory.md: 2-norm of the unit head, causal mask."""

import math

import numpy as np

from keras_lipattn.bounds.column_majorant import majorant_norm
from keras_lipattn.bounds.parameter_search import search
from keras_lipattn.bounds.row_functional import Floats, cells, diagonal_parts, off_diagonal, points
from keras_lipattn.linalg import SAFETY


def causal_mask_bound(tokens: int, *, count: int = 6000) -> float:
    """Upper bound of the 2-norm constant for `tokens >= 2` and the causal mask.

    Args:
        tokens: number of tokens `N`.
        count: number of cells of the final evaluation.

    Returns:
        A float, certified whatever parameters the search came up with.
    """
    n = tokens - 1
    sampled = np.unique(np.round(np.geomspace(1, tokens, 24)).astype(np.int64))
    rough = _Blocks(tokens, points(n, 120), starts=sampled - 1, ends=sampled)
    axes = (
        np.linspace(math.log(0.005), 0.0, 7),
        np.linspace(math.log(0.05), math.log(20.0), 6),
        np.linspace(-4.0, 2.0, 5),
    )
    point = search(lambda *logs: rough.squared_bound(*np.exp(logs)), axes)
    ends = np.unique(np.round(np.geomspace(1, tokens, 160)).astype(np.int64))
    ends = np.union1d(ends, np.arange(1, min(tokens, 64) + 1))
    starts = np.concatenate([[0], ends[:-1]])
    fine = _Blocks(tokens, cells(n, count), starts=starts, ends=ends)
    return SAFETY * math.sqrt(fine.squared_bound(*np.exp(point)))


class _Blocks:
    """Cells of the row mass times blocks of positions, for one number of tokens.

    A block `(start, end]` of positions is evaluated with the largest number of visible keys,
    `end - 1`, and the largest number of later queries, `N - start - 1`. The first is `(0, 1]`.
    """

    def __init__(
        self, tokens: int, grid: tuple[Floats, Floats], *, starts: np.ndarray, ends: np.ndarray
    ) -> None:
        self.n = tokens - 1
        self.low, self.high = grid
        self.later = np.sqrt(tokens - starts - 1.0)
        keys = ends[1:, None] - 1.0
        own, slope, log_mass = diagonal_parts(self.low, self.high)
        diagonal = own + slope * np.maximum(np.log(keys) - log_mass, 0.0)
        self.diagonal_squared = np.where(self.low <= keys, diagonal**2, 0.0)

    def squared_bound(self, beta: float, excess_kappa: float, excess: float) -> float:
        """Square of the bound; `zbar` is `1 + excess` times the smallest admissible value."""
        kappa = 1.0 + excess_kappa
        weight = np.minimum(1.0, kappa / (self.high + np.sqrt(self.high**2 + kappa)))
        load = off_diagonal(self.high, self.n, beta) / (1.0 + self.low) ** 2 / weight
        scale = (1.0 + excess) * load.max()
        inverse = 1.0 / (1.0 - load / scale)
        # The first token sees only itself: its row mass is 0, which lies in the first cell.
        row = np.concatenate([inverse[:1], (self.diagonal_squared * inverse).max(axis=1)])
        column = float(majorant_norm(1.0, 1.0 / beta)) * math.sqrt(kappa) * scale
        return float((row + column * self.later).max())
