"""Lipschitz constants of the unit head, the map `Y -> softmax(-|y_i - y_j|^2) Y`.

Theorems 3.A to 3.G bound the 2-norm, Theorem 4 is the exact constant of the token norm, Theorem
5.3 needs two numbers for the max norm. A mask keeps the diagonal: a token always sees itself.
"""

import functools
import math
import typing

import numpy as np

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.bounds.unit_head_lemmas import (
    ENTROPY_PEAK,
    SQUARE_MAJORANT,
    Cells,
    Floats,
    cells,
    diagonal_block,
    diagonal_parts,
    majorant_norm,
    off_diagonal,
    optimized_bound,
    phi_inv,
    points,
    s_star,
)
from keras_lipattn.bounds.visible_pairs import Cliques
from keras_lipattn.linalg import SAFETY

MASKS = ("full", "causal", "any")
IDENTITY = "the identity of a single token"
UNKNOWN_LENGTH = (
    "the number of tokens is not known and the constant grows with it; state the sequence length"
)

# Number of cells of the row mass on which a theorem is evaluated.
_CELLS = 6000
# Split of the constant term in Theorem 3.B; 0 first.
_SPLITS = np.concatenate([[0.0], np.geomspace(0.1, 400.0, 44)])
# Logarithms of `beta` and of the excess for Theorems 3.D and 3.E.
_DEGREE_AXES = np.linspace(math.log(0.001), 0.0, 12), np.linspace(-5.0, 4.0, 12)


class UnitBound(typing.NamedTuple):
    """Constant of the unit head and the theorem it comes from.

    Attributes:
        value: the constant, a Python float. For `"linf"` it is the row constant `V` of
            Theorem 4, which Theorem 5.3 turns into a bound of the layer.
        theorem: the theorem that gave the smallest value.
        score_part: for `"linf"` the constant `4 Phi` of the part of the derivative that goes
            through the scores; 0 for the other norms.
        reason: why `value` is `inf`, empty otherwise.
    """

    value: float
    theorem: str
    score_part: float = 0.0
    reason: str = ""


def unit_head_bound(
    tokens: int | None,
    mask: str = "full",
    norm: str = "l2",
    *,
    n_keys: int | None = None,
    n_queries: int | None = None,
    cliques: Cliques | None = None,
) -> UnitBound:
    """Certified Lipschitz constant of the unit head: the smallest of Theorems 3.A to 3.G, or 4.

    The mask must keep the diagonal. No token may see a padded one, and padded rows of the output
    must be zero; `"full"` and `"causal"` then cover every shorter or padded sequence too.

    Args:
        tokens: largest number of tokens `N >= 1`, or `None` when unknown.
        mask: `"full"` (padding included), `"causal"`, or `"any"` (any mask with diagonal).
        norm: `"l2"`, `"token"` or `"linf"`.
        n_keys: for `mask="any"`, the largest number of *other* keys a query sees; `N - 1` by
            default.
        n_queries: for `mask="any"`, the largest number of *other* queries that see a key;
            `N - 1` by default.
        cliques: for `mask="any"`, the cliques of the mask if they are known.

    Returns:
        A `UnitBound` of Python floats, cached. When `tokens` is `None` the value is `inf`,
        except for `mask="any"` with the degrees that the norm needs.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> bound = keras_lipattn.bounds.unit_head_bound(64)
    >>> round(bound.value, 3), bound.theorem
    (8.697, 'Theorem 3.B')

    Reference: Theorems 3.A to 3.D, 3.G, 4 and 5.3 of docs/theory.md; Kim, Papamakarios and Mnih,
        "The Lipschitz constant of self-attention", ICML 2021.
    """
    if mask not in MASKS:
        raise ValueError(f"`mask` must be one of {list(MASKS)}. Received: mask={mask!r}")
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {sorted(NORMS)}. Received: norm={norm!r}")
    tokens = _whole("tokens", tokens, least=1)
    n_keys = _whole("n_keys", n_keys, least=0)
    n_queries = _whole("n_queries", n_queries, least=0)
    if mask != "any":
        n_keys = n_queries = cliques = None
    if tokens is not None:
        n_keys = tokens - 1 if n_keys is None else min(n_keys, tokens - 1)
        n_queries = tokens - 1 if n_queries is None else min(n_queries, tokens - 1)
    if n_keys is None or (norm == "l2" and n_queries is None):
        return UnitBound(math.inf, "", math.inf if norm == "linf" else 0.0, UNKNOWN_LENGTH)
    if norm == "token":
        return UnitBound(token_norm_bound(n_keys), "Theorem 4")
    if norm == "linf":
        four_phi = SAFETY * 4.0 * phi_inv(n_keys)
        return UnitBound(token_norm_bound(n_keys), "Theorem 5.3", four_phi)
    if mask == "any":
        return _l2_by_degrees(tokens, n_keys, n_queries, cliques)
    return _l2(tokens, mask)


def token_norm_bound(n_keys: float) -> float:
    """Theorem 4: `V = 1 + 4 S*`, the constant of the unit head in the token norm.

    Args:
        n_keys: largest number of other keys a query sees, `>= 0`.

    Returns:
        A float; attained when `n_keys` is even, for every mask with diagonal.
    """
    return SAFETY * (1.0 + 4.0 * s_star(n_keys))


def published_head_bound(tokens: int) -> float:
    """The 2-norm constant of Kim, Papamakarios and Mnih, `sqrt(N) (4 Phi + 1)`.

    Args:
        tokens: number of tokens `N >= 1`.

    Returns:
        A float. Valid for every mask that keeps the diagonal.

    Reference: "The Lipschitz constant of self-attention", ICML 2021, Theorem 3.2.
    """
    return math.sqrt(tokens) * (4.0 * phi_inv(tokens - 1) + 1.0)


def weighted_bound(n_keys: float, n_queries: float) -> float:
    """Theorem 3.E (i): the 2-norm where keys have weights, the own one being 1.

    Args:
        n_keys: largest sum of the weights of the other keys of a query, `> 0`.
        n_queries: largest sum of the weights of a key for the other queries.

    Returns:
        A float, certified.
    """
    return _by_degrees(n_keys, n_queries, _weighted_entry)[0]


def weighted_bounds(totals: typing.Sequence[float]) -> list[float]:
    """`weighted_bound(n, n)` for increasing `n`, from a faster search on fewer cells.

    Each search starts around the parameters of the one before.
    """
    bounds, axes = [], _DEGREE_AXES
    for n in totals:
        bound, logs = _by_degrees(n, n, _weighted_entry, axes=axes, count=1500)
        bounds.append(bound)
        axes = [np.linspace(log - 0.4, log + 0.4, 3) for log in logs]
        axes[0] = np.minimum(axes[0], 0.0)
    return bounds


@functools.lru_cache(maxsize=4096)
def _l2(tokens: int, mask: str) -> UnitBound:
    if tokens == 1:
        return UnitBound(1.0, IDENTITY)
    own = (
        UnitBound(symmetric_bound(tokens - 1, math.sqrt(tokens - 1.0)), "Theorem 3.B")
        if mask == "full"
        else UnitBound(_causal_mask(tokens), "Theorem 3.C")
    )
    phi = phi_inv(tokens - 1)
    column = math.sqrt(tokens if mask == "full" else 2.0 * tokens)
    closed = math.sqrt(column) + 2.0 * phi + 2.0 * math.sqrt(SQUARE_MAJORANT * phi * column)
    return min(
        own,
        UnitBound(SAFETY * closed, "Theorem 3.A"),
        _l2_by_degrees(tokens, tokens - 1, tokens - 1),
    )


@functools.lru_cache(maxsize=4096)
def _l2_by_degrees(
    tokens: int | None, n_keys: int, n_queries: int, cliques: Cliques | None = None
) -> UnitBound:
    if n_keys == 0 or n_queries == 0:
        return UnitBound(1.0, IDENTITY)
    phi = phi_inv(n_keys)
    closed = math.sqrt(1.0 + n_queries / 2.0) + 2.0 * phi
    closed += 2.0 * math.sqrt(ENTROPY_PEAK * phi * n_queries)
    candidates = [
        UnitBound(_by_degrees(n_keys, n_queries, _masked_entry)[0], "Theorem 3.D"),
        UnitBound(SAFETY * closed, "Theorem 3.A"),
    ]
    if cliques is not None:
        own = _clique_mask(n_keys, cliques.root)
        if cliques.symmetric:
            own = min(own, symmetric_bound(n_keys, cliques.root))
        candidates.append(UnitBound(own, "Theorem 3.G"))
    if tokens is not None:
        published = SAFETY * math.sqrt(tokens) * (4.0 * phi + 1.0)
        candidates.append(UnitBound(published, "Kim et al., Theorem 3.2"))
    return min(candidates)


@functools.lru_cache(maxsize=4096)
def symmetric_bound(
    n_keys: float, root: float, *, least: float = 1.0, asymmetry: float = 1.0
) -> float:
    """Theorem 3.B, and 3.F and 3.G for symmetric masks.

    Args:
        n_keys: largest sum of the weights of the other keys of a query, `> 0`.
        root: largest sum over the cliques of a key of the roots of the squares of its weights;
            `sqrt(N - 1)` for a full mask without weights.
        least: smallest weight of a visible key.
        asymmetry: largest ratio of the weights of two tokens for each other.

    Returns:
        A float, certified.
    """
    return optimized_bound(
        functools.partial(_symmetric_squared, n_keys, root, least, asymmetry),
        (np.linspace(math.log(0.005), 0.0, 12), np.linspace(-4.0, 4.0, 12)),
        sample=points(n_keys, 160),
        cover=cells(n_keys, _CELLS),
    )[0]


def _symmetric_squared(
    n_keys: float,
    root: float,
    least: float,
    asymmetry: float,
    grid: Cells,
    beta: float,
    excess: float,
) -> float:
    """Square of the bound; `B` is `1 + excess` times the smallest value the grid admits."""
    low, high = grid
    load = off_diagonal(high, n_keys, beta) / (1.0 + low) ** 1.5
    if least != 1.0:
        load = load * np.sqrt((1.0 + high / least) / (1.0 + low))
    scale = (1.0 + excess) * load.max()
    columns = asymmetry * _SPLITS[:, None] * high + _split_constants(beta)[:, None] * root
    row = diagonal_block(low, high, n_keys) ** 2 / (1.0 - load / scale)
    return float((row + scale * columns.min(axis=0)).max())


@functools.lru_cache(maxsize=4096)
def _split_constants(beta: float) -> Floats:
    return majorant_norm(1.0 - _SPLITS, 1.0 / beta)


def _causal_mask(tokens: int) -> float:
    """Theorem 3.C for `tokens >= 2`: blocks `(start, end]` of positions.

    A block is evaluated with the largest number of visible keys, `end - 1`, and the largest number
    of later queries, `N - start - 1`. The first block is `(0, 1]`.
    """

    def blocks(ends: np.ndarray) -> tuple[Floats, Floats]:
        starts = np.concatenate([[0], ends[:-1]])
        return ends - 1.0, np.sqrt(tokens - starts - 1.0)

    positions = _positions(tokens, 24)
    # Points of a search, not blocks.
    sampled = positions - 1.0, np.sqrt(tokens - positions + 0.0)
    ends = np.union1d(_positions(tokens, 160), np.arange(1, min(tokens, 64) + 1))
    return ordered_bound(sampled, blocks(ends))


def _clique_mask(n_keys: int, root: float) -> float:
    """Theorem 3.G for masks that need not be symmetric."""
    block = np.array([float(n_keys)]), np.array([root])
    return ordered_bound(block, block)


def ordered_bound(
    sampled: tuple[Floats, Floats], blocks: tuple[Floats, Floats], *, least: float = 1.0
) -> float:
    """Theorems 3.C, 3.F and 3.G for masks that need not be symmetric.

    Args:
        sampled: `(keys, roots)` of tokens for the search, see `_OrderedGrid`.
        blocks: the same of blocks that cover all tokens.
        least: smallest weight of a visible key.

    Returns:
        A float, certified.
    """
    axes = (
        np.linspace(math.log(0.005), 0.0, 7),
        np.linspace(math.log(0.05), math.log(20.0), 6),
        np.linspace(-4.0, 2.0, 5),
    )
    n_keys = float(blocks[0].max())
    return optimized_bound(
        _OrderedGrid.squared_bound,
        axes,
        sample=_OrderedGrid(points(n_keys, 120), *sampled, least),
        cover=_OrderedGrid(cells(n_keys, _CELLS), *blocks, least),
    )[0]


def _positions(tokens: int, count: int) -> np.ndarray:
    return np.unique(np.round(np.geomspace(1, tokens, count)).astype(np.int64))


class _OrderedGrid:
    """Cells of the row mass times blocks of tokens.

    Args:
        grid: cells up to the largest number of visible keys.
        keys: shape `(blocks,)`, the largest number or weight of other keys of a token of the block.
        roots: shape `(blocks,)`, the sum of roots of the cliques that see a token of the block,
            times the largest weight.
        least: smallest weight of a visible key.
    """

    def __init__(self, grid: Cells, keys: Floats, roots: Floats, least: float) -> None:
        self.low, self.high = grid
        # The mass of the other tokens without weights is at most this.
        self.mass = self.high / least
        # A token that sees only itself has row mass 0 and derivative 1.
        self.alone, self.keys = roots[keys == 0.0], keys[keys > 0.0, None]
        self.roots = roots[keys > 0.0]
        own, slope, log_mass = diagonal_parts(self.low, self.high)
        diagonal = own + slope * np.maximum(np.log(self.keys) - log_mass, 0.0)
        self.used = self.low <= self.keys
        self.diagonal_squared = np.where(self.used, diagonal**2, 0.0)

    def squared_bound(self, beta: float, excess_kappa: float, excess: float) -> float:
        """Square of the bound; `zbar` is `1 + excess` times the smallest admissible value."""
        kappa = 1.0 + excess_kappa
        weight = np.minimum(1.0, kappa / (self.mass + np.sqrt(self.mass**2 + kappa)))
        load = off_diagonal(self.high, self.keys, beta) / ((1.0 + self.low) ** 2 * weight)
        load = np.where(self.used, load, 0.0)
        scale = (1.0 + excess) * load.max()
        row = (self.diagonal_squared / (1.0 - load / scale)).max(axis=1)
        column = float(majorant_norm(1.0, 1.0 / beta)) * math.sqrt(kappa) * scale
        alone = 1.0 + column * self.alone.max(initial=0.0)
        return float(max((row + column * self.roots).max(), alone))


def _by_degrees(
    n_keys: float,
    n_queries: float,
    entry: typing.Callable[[Floats, float], Floats | float],
    *,
    axes: typing.Sequence[Floats] = _DEGREE_AXES,
    count: int = _CELLS,
) -> tuple[float, tuple[float, ...]]:
    """Theorems 3.D and 3.E (i), which differ in the bound `h` of an entry: `(bound, logs)`."""
    return optimized_bound(
        functools.partial(_degrees_squared, n_keys, n_queries, entry),
        axes,
        sample=points(n_keys, 160),
        cover=cells(n_keys, count),
    )


def _degrees_squared(
    n_keys: float,
    n_queries: float,
    entry: typing.Callable[[Floats, float], Floats | float],
    grid: Cells,
    beta: float,
    excess: float,
) -> float:
    """Square of the bound; `B` is `1 + excess` times the smallest value the grid admits."""
    low, high = grid
    load = off_diagonal(high, n_keys, beta) * entry(high, beta) / (1.0 + low) ** 2
    scale = (1.0 + excess) * load.max()
    row = diagonal_block(low, high, n_keys) ** 2 / (1.0 - load / scale)
    return float(row.max() + scale * n_queries)


def _masked_entry(high: Floats, beta: float) -> Floats:
    """`h(S)`, the largest `kappa (1 + log(1 / kappa) / beta)` of an entry `kappa <= min(1, S)`."""
    kappa = np.minimum(np.minimum(1.0, high), math.exp(beta - 1.0))
    return kappa * (1.0 - np.log(kappa) / beta)


def _weighted_entry(high: Floats, beta: float) -> float:
    """The same for any `kappa` in `(0, 1]`: a near key of small weight adds little to `S`."""
    return math.exp(beta - 1.0) / beta


def _whole(name: str, value: int | None, *, least: int) -> int | None:
    if value is None:
        return None
    if not float(value).is_integer() or value < least:
        raise ValueError(
            f"`{name}` must be an integer that is at least {least}. Received: {name}={value}"
        )
    return int(value)
