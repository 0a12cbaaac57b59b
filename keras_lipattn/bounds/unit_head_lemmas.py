"""Lemmas 3.1 to 3.5 of docs/theory.md, which the theorems on the unit head are made of.

`S` is the mass `sum_{j != i} exp(-|y_i - y_j|^2)` of the other tokens in row `i` of the attention
matrix, `n` their number or weight. Arrays of cells have shape `(K,)`. A quantity is bounded on a
whole cell `[low, high]` of `S`, so that its maximum over cells that cover `[0, n]` is a proof
(section 3.5).
"""

import functools
import itertools
import math
import typing

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special

from keras_lipattn.linalg import SAFETY

Floats = npt.NDArray[np.float64]
Cells = tuple[Floats, Floats]

# Lemma 3.4: t^2 exp(-t^2) has a majorant of norm 0.5158595, rounded up.
SQUARE_MAJORANT = 0.51586
# W0(1/e), rounded up: the largest value of K log(1/K) / (1 + K).
ENTROPY_PEAK = 0.278465


def phi_inv(n: float) -> float:
    """`Phi = W0(n / e)`, the largest trace of a row's covariance (Lemma 3.1).

    It is the inverse of `phi(x) = x exp(x + 1)`.

    Args:
        n: number of other tokens that a query sees, `>= 0`.

    Returns:
        A float.

    Raises:
        ValueError: if `n` is negative or NaN.

    Reference: Kim, Papamakarios and Mnih, "The Lipschitz constant of self-attention",
        ICML 2021, Theorem 3.2.
    """
    return _lambert(n, 1.0)


def s_star(n: float) -> float:
    """`S* = W0(n exp(-3/2))`, the row mass at which a diagonal block is largest (Lemma 3.1).

    The largest norm of a diagonal block of the Jacobian is `1 + 2 S*`. The exact constant of the
    token norm is `1 + 4 S*` (Theorem 4).

    Args:
        n: number of other tokens that a query sees, `>= 0`.

    Returns:
        A float.

    Raises:
        ValueError: if `n` is negative or NaN.
    """
    return _lambert(n, 1.5)


def cells(n: float, count: int) -> Cells:
    """Geometric cells that cover `[0, n]`; the first one starts at 0.

    Args:
        n: number of other tokens, or their weight, `> 0`.
        count: number of cells `K`.

    Returns:
        `(low, high)`, each of shape `(K,)`.
    """
    edges = np.concatenate([[0.0], np.geomspace(min(1e-5, n * 1e-3), n, count)])
    return edges[:-1], edges[1:]


def points(n: float, count: int) -> Cells:
    """Points of `(0, n]` as cells of width 0: enough for a search, but no proof.

    Args:
        n: number of other tokens, or their weight, `> 0`.
        count: number of points `K`.

    Returns:
        `(points, points)`, each of shape `(K,)`.
    """
    sample = np.geomspace(min(1e-3, n * 1e-3), n, count)
    return sample, sample


def diagonal_parts(low: Floats, high: Floats) -> tuple[Floats, Floats, Floats]:
    """The parts of `a_n(S) = (1 + 2 S log(n / S)) / (1 + S)` that do not depend on `n`.

    Args:
        low, high: cells, shape `(K,)`.

    Returns:
        `(own, slope, log_mass)`, each `(K,)`. On a cell, for every `n >= e * high[0]`,
        `a_n <= own + slope * max(log(n) - log_mass, 0)`.
    """
    # On the first cell S log(n/S) increases. Elsewhere its factors are bounded one by one.
    first = low <= 0.0
    own = 1.0 / (1.0 + low)
    slope = 2.0 * np.where(first, high, high / (1.0 + high))
    log_mass = np.log(np.where(first, high, low))
    return own, slope, log_mass


def diagonal_block(low: Floats, high: Floats, n: float) -> Floats:
    """Upper bound of `a_n(S)` (Lemma 3.1) on each cell, shape `(K,)`."""
    own, slope, log_mass = diagonal_parts(low, high)
    return own + slope * np.maximum(math.log(n) - log_mass, 0.0)


def off_diagonal(high: Floats, n: float | Floats, beta: float) -> Floats:
    """`S + Psi(S)` of Lemma 3.3 at the upper end of each cell; it does not decrease with `S`.

    Args:
        high: upper ends of the cells, shape `(K,)`.
        n: number of other tokens, or their weight; an array broadcasts.
        beta: parameter of the lemma, `0 < beta <= 1`.

    Returns:
        Shape `(K,)` or that of the broadcast. Divided by `1 + S` it is `omega(S)`.
    """
    peak = _peak(beta)
    distance = np.log(n / high)
    attained = high * np.maximum(_gain(np.maximum(distance, 2.0), beta), 0.0)
    return high + np.where(distance >= peak, attained, n * math.exp(-peak) * _gain(peak, beta))


def majorant_norm(constant: npt.ArrayLike, gain: float) -> Floats:
    """Norm of a function above `exp(-|e|^2) (constant + gain (e.v)^2)` (Lemma 3.4).

    It is the norm of one explicit function, so every choice of its parameters `(s, x)` is valid.
    The smallest norm on a grid of them is returned.

    Args:
        constant: float or array of shape `(...)`.
        gain: positive float.

    Returns:
        Float64 array of shape `(...)`.
    """
    amplitude, drop, excess = _majorants()
    constant = np.asarray(constant, np.float64)[..., None]
    amplitude = gain * amplitude
    squares = (constant + gain * drop + amplitude) ** 2 + 2.0 * (amplitude * excess) ** 2
    return np.sqrt(squares.min(axis=-1))


Grid = typing.TypeVar("Grid")


def optimized_bound(
    squared_bound: typing.Callable[..., float],
    axes: typing.Sequence[Floats],
    *,
    sample: Grid,
    cover: Grid,
) -> tuple[float, tuple[float, ...]]:
    """The bound of a theorem with free parameters, at good values of them.

    The theorem holds for every value of its parameters, so the search for them needs no proof: it
    minimizes the bound on a sample of the row masses, which is fast but may miss the maximum. The
    result is the bound on cells that cover all row masses, at the parameters that were found. It
    is certified for every outcome of the search.

    The search is a grid, followed by steps of shrinking size to better neighbors. Nelder-Mead in
    `scipy.optimize` gave bounds up to 3e-4 larger, because the maxima have ridges.

    Args:
        squared_bound: square of the bound, a function of a grid of row masses and of the
            parameters.
        axes: logarithms of the candidates, one increasing, evenly spaced array per parameter.
        sample: the grid for the search.
        cover: the grid for the result.

    Returns:
        `(bound, logs)`: the bound, a float, and the logarithms of the parameters.
    """
    logs = _search(lambda point: squared_bound(sample, *map(math.exp, point)), axes)
    return SAFETY * math.sqrt(squared_bound(cover, *map(math.exp, logs))), logs


def _search(
    objective: typing.Callable[[tuple[float, ...]], float], axes: typing.Sequence[Floats]
) -> tuple[float, ...]:
    """The best point that a grid search and seven halvings of its step lead to."""
    best_value, best = np.inf, tuple(float(axis[0]) for axis in axes)
    for point in itertools.product(*(axis.tolist() for axis in axes)):
        value = objective(point)
        if value < best_value:
            best_value, best = value, point
    # Steps along single axes would get stuck on the ridges of a maximum.
    moves = [
        np.array(move) for move in itertools.product((-1, 0, 1), repeat=len(axes)) if any(move)
    ]
    steps = np.array([axis[1] - axis[0] for axis in axes]) / 2.0
    low, high = np.array([(axis[0], axis[-1]) for axis in axes]).T
    for _ in range(7):
        improved = True
        while improved:
            improved = False
            for move in moves:
                point = tuple(np.clip(best + move * steps, low, high).tolist())
                value = objective(point)
                if value < best_value:
                    best_value, best, improved = value, point, True
        steps = steps / 2.0
    return best


@functools.cache
def _majorants() -> tuple[Floats, Floats, Floats]:
    """The functions of Lemma 3.4 on a grid of `(s, x)`, for `gain = 1`."""
    s = np.geomspace(0.25, 2.2, 48)[:, None]
    x = np.geomspace(0.25, 6.5, 64)[None, :]
    amplitude = x / (2.0 * s * s * np.sinh(x))
    drop = (x * x - 2.0 * x / np.tanh(x)) / (4.0 * s * s)
    excess = np.broadcast_to(np.sinh(s * s), amplitude.shape)
    return amplitude.ravel(), drop.ravel(), excess.ravel()


def _gain(r, beta: float):
    """`F(r)` of Lemma 3.3."""
    return r * (4.0 * beta - (1.0 + 2.0 * beta) ** 2 / (beta + r))


def _peak(beta: float) -> float:
    """The maximizer of `exp(-r) F(r)` on `r >= 2`, the root of `F - F'`."""
    square = (1.0 + 2.0 * beta) ** 2

    def difference(r):
        return _gain(r, beta) - (4.0 * beta - square * beta / (beta + r) ** 2)

    return scipy.optimize.brentq(difference, 2.0, square / (4.0 * beta) + 20.0)


def _lambert(n: float, exponent: float) -> float:
    """`W0(n exp(-exponent))`."""
    n = float(n)
    if not n >= 0.0:
        raise ValueError(f"`n` must be a number of tokens, at least 0. Received: n={n}")
    return float(scipy.special.lambertw(n * math.exp(-exponent)).real)
