"""What one row of the attention matrix contributes, bounded on cells of its mass `S`.

`S` is the mass `sum_{j != i} exp(-|y_i - y_j|^2)` of the other tokens. Every quantity here is
an upper bound on a whole cell, so that a maximum over cells is a proof (section 3.5 of
docs/theory.md). Arrays of cells have shape `(K,)`.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def cells(n: float, count: int) -> tuple[Floats, Floats]:
    """Geometric cells that cover `[0, n]`, the first one reaching down to 0.

    Args:
        n: number of other tokens, or their weight, `> 0`.
        count: number of cells `K`.

    Returns:
        `(low, high)`, each of shape `(K,)`.
    """
    edges = np.concatenate([[0.0], np.geomspace(min(1e-5, n * 1e-3), n, count)])
    return edges[:-1], edges[1:]


def points(n: float, count: int) -> tuple[Floats, Floats]:
    """Points of `(0, n]` as cells of no width: for a search, not for a proof.

    Args:
        n: number of other tokens, or their weight, `> 0`.
        count: number of points `K`.

    Returns:
        `(points, points)`, each of shape `(K,)`.
    """
    sample = np.geomspace(min(1e-3, n * 1e-3), n, count)
    return sample, sample


def diagonal_parts(low: Floats, high: Floats) -> tuple[Floats, Floats, Floats]:
    """The pieces of `a_n(S) = (1 + 2 S log(n / S)) / (1 + S)` that do not depend on `n`.

    Args:
        low, high: cells, shape `(K,)`.

    Returns:
        `(own, slope, log_mass)`, each `(K,)`: on a cell, for every `n >= e * high[0]`,
        `a_n <= own + slope * max(log(n) - log_mass, 0)`.
    """
    # On the first cell S log(n/S) increases, elsewhere its factors are bounded one by one.
    first = low <= 0.0
    own = 1.0 / (1.0 + low)
    slope = 2.0 * np.where(first, high, high / (1.0 + high))
    log_mass = np.log(np.where(first, high, low))
    return own, slope, log_mass


def diagonal_block(low: Floats, high: Floats, n: float) -> Floats:
    """Upper bound of `a_n(S)` (Lemma 3.1 of docs/theory.md) on each cell, shape `(K,)`."""
    own, slope, log_mass = diagonal_parts(low, high)
    return own + slope * np.maximum(math.log(n) - log_mass, 0.0)


def off_diagonal(high: Floats, n: float, beta: float) -> Floats:
    """`S + Psi(S)` of Lemma 3.3 at the upper end of each cell; nondecreasing in `S`.

    Args:
        high: upper ends of the cells, shape `(K,)`.
        n: number of other tokens, or their weight.
        beta: parameter of the lemma, `0 < beta <= 1`.

    Returns:
        Shape `(K,)`; divided by `1 + S` it is `omega(S)`.
    """
    peak = _peak(beta)
    distance = np.log(n / high)
    attained = high * np.maximum(_gain(np.maximum(distance, 2.0), beta), 0.0)
    return high + np.where(distance >= peak, attained, n * math.exp(-peak) * _gain(peak, beta))


def _gain(r, beta: float):
    return r * (4.0 * beta - (1.0 + 2.0 * beta) ** 2 / (beta + r))


def _peak(beta: float) -> float:
    """Maximiser of `exp(-r) F(r)` on `r >= 2`, by bisection of `F = F'`."""
    square = (1.0 + 2.0 * beta) ** 2
    low, high = 2.0, square / (4.0 * beta) + 20.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if _gain(middle, beta) < 4.0 * beta - square * beta / (beta + middle) ** 2:
            low = middle
        else:
            high = middle
    return high
