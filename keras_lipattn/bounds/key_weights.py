"""Theorems 3.E and 4.1 of docs/theory.md: attention whose keys have weights.

Biases added to the scores, and tokens that count several times, are weights `w_ij` of key `j` for
query `i`, the own one being 1. The constants depend on the weights through four sums
(`KeyWeights`), computed by the same lines on the host and in graphs.
"""

import functools
import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.bounds.unit_head import IDENTITY, UnitBound, weighted_bound, weighted_bounds
from keras_lipattn.linalg import SAFETY

# Smaller sums of weights are replaced by this one: the proof of Theorem 4 needs a sum that is not
# too small, and the constant is monotone.
LEAST_OTHERS = 0.2
# Covers the rounding of sums of weights, in float64 and for weights that were float32.
_CERTIFIED = 1.0 + 1e-6
# Graphs in float32 lose up to 1e-6. Their constant exceeds the one of the host for equal weights.
_ON_THE_HOST, _IN_A_GRAPH = 1.0 + 1.8e-5, 1.0 + 2e-5
# Logarithms of weights at which graphs know the constant that is evaluated on cells.
_STEP = 0.125
_POINTS = np.arange(-4.0, 12.0, _STEP)
# For larger logarithms squares in the cells of Theorem 3.E leave the range of float64.
_MOST = 300.0
# Number of rows of a matrix of weights that are processed together.
_ROWS = 256


class KeyWeights(typing.NamedTuple):
    """Sums over weights `w_ij` of key `j` for query `i`, the own one being 1; shape `(H,)` each.

    Attributes:
        log_keys: logarithm of `max_i sum_{j != i} w_ij`.
        log_queries: logarithm of `max_j sum_{i != j} w_ij`.
        columns: `max_j sum_{i != j} w_ij / (1 + w_ij)`.
        entropies: `max_j sum_{i != j} W0(w_ij / e)`.
    """

    log_keys: typing.Any
    log_queries: typing.Any
    columns: typing.Any
    entropies: typing.Any


class SeenByLag(typing.NamedTuple):
    """The keys on one side of a query, by distance.

    Attributes:
        log_weights: shape `(H, R)`, of the keys at distance 1 to R; a key further away has the
            weight of the last one.
        count: largest number of keys that are seen, at least `R`.
    """

    log_weights: typing.Any
    count: int


def weighted_unit_bound(
    weights: KeyWeights | None, norm: str, xp: typing.Any, *, slack: float | None = None
) -> UnitBound:
    """Constants of the unit head by Theorems 3.E and 4.1, differentiable in the weights.

    Args:
        weights: `KeyWeights` of the heads, or `None` where no query sees another token.
        norm: `"l2"`, `"token"` or `"linf"`.
        xp: array namespace, `numpy` or `keras.ops`.
        slack: factor that covers rounding. The default is larger in graphs than on the host.

    Returns:
        A `UnitBound` whose numbers are arrays of the namespace, shape `(H,)`, or floats.
    """
    if weights is None:
        return UnitBound(1.0, "", 0.0)
    if slack is None:
        slack = _ON_THE_HOST if xp is np else _IN_A_GRAPH
    phi = slack * log_lambert(weights.log_keys - 1.0, xp)
    if norm == "l2":
        column = xp.sqrt(1.0 + slack * weights.columns)
        scores = xp.sqrt(phi * (slack * weights.entropies))
        closed = column + 2.0 * (phi + scores)
        total = xp.maximum(weights.log_keys, weights.log_queries)
        return UnitBound(xp.minimum(closed, slack * _between(total, closed, xp)), "Theorem 3.E")
    others = xp.maximum(weights.log_keys, math.log(LEAST_OTHERS))
    token = 1.0 + 4.0 * slack * log_lambert(others - 1.5, xp)
    if norm == "token":
        return UnitBound(token, "Theorem 4.1")
    return UnitBound(token, "Theorem 5.3 with Theorem 4.1", 4.0 * phi)


def weighted_layer_bound(
    b: npt.ArrayLike,
    c: npt.ArrayLike,
    *,
    norm: str,
    weights: KeyWeights | None,
    mild: npt.ArrayLike = math.inf,
    **others: typing.Any,
) -> LipschitzBound:
    """Certified bound of a layer whose keys have weights: section 5 with Theorems 3.E and 4.1.

    Args:
        b: shape `(H, D, k)`, see `certified_layer_bound`.
        c: shape `(H, k, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        weights: `KeyWeights` of the heads, shape `(H,)` or `(1,)`; `None` where no query sees
            another token.
        mild: constants of the heads by Theorem 3.F, for `norm="l2"`.
        **others: `product_scale`, `query_error`, `product_error`, `published` of
            `certified_layer_bound`.

    Returns:
        A `LipschitzBound`, `inf` with the reason where weights are not finite.
    """
    heads = len(np.asarray(b))
    unit = weighted_unit_bound(weights, norm, np, slack=_CERTIFIED)
    constants = np.broadcast_to(weighted_constants(weights, norm), heads)
    theorem = unit.theorem or IDENTITY
    if norm == "l2" and np.any(np.asarray(mild) < constants):
        constants, theorem = np.minimum(constants, mild), "Theorems 3.E and 3.F"
    scores = np.broadcast_to(SAFETY * np.asarray(unit.score_part), heads)
    return certified_layer_bound(
        b,
        c,
        norm=norm,
        tokens=None,
        head_constants=constants,
        head_scores=scores,
        head_theorem=theorem,
        **others,
    )


def weighted_constants(weights: KeyWeights | None, norm: str) -> npt.NDArray[np.float64]:
    """Certified constants of the unit head by Theorems 3.E and 4.1, one for each head.

    Args:
        weights: see `weighted_unit_bound`.
        norm: `"l2"`, `"token"` or `"linf"` (the row constant of Theorem 5.3).
    """
    unit = weighted_unit_bound(weights, norm, np, slack=_CERTIFIED)
    constants = np.atleast_1d(SAFETY * np.asarray(unit.value))
    if weights is None or norm != "l2":
        return constants
    return np.minimum(constants, _on_cells(weights))


def weights_by_lag(
    before: SeenByLag,
    after: SeenByLag,
    tokens: int | None,
    xp: typing.Any,
    *,
    n_keys: int | None = None,
    n_queries: int | None = None,
    epsilon: float = 0.0,
) -> KeyWeights | None:
    """Sums of weights that depend on the distance of two positions.

    Args:
        before: the keys that a query sees before it.
        after: the keys that it sees after it.
        tokens: largest number of tokens, or `None` when unknown.
        xp: array namespace, `numpy` or `keras.ops`.
        n_keys: largest number of other keys a query sees, if smaller than that of `before` and
            `after`.
        n_queries: largest number of other queries that see a key.
        epsilon: machine epsilon of the dtype in which a graph sums; the sums then include an
            allowance for rounding.

    Returns:
        `KeyWeights`, or `None` where no query sees another token.
    """
    sides = before, after
    if before.count + after.count == 0 or tokens == 1 or n_keys == 0 or n_queries == 0:
        return None
    everything = xp.concatenate([side.log_weights for side in sides], axis=1)
    peak = xp.max(everything, axis=1)
    shift = peak[:, None] if xp is np else xp.stop_gradient(peak)[:, None]
    numbers = _numbers_seen(before, after, tokens)
    slack = 1.0 + 2.0 * everything.shape[1] * epsilon

    def largest(function):
        """Largest sum of a row, over the keys before a position and those after it."""
        total = 0.0
        for side, seen in zip(sides, numbers, strict=True):
            values, size = function(side.log_weights), side.log_weights.shape[1]
            if size == 0:
                continue
            sums = xp.pad(xp.cumsum(values, axis=1), ((0, 0), (1, 0)))
            total = total + xp.take(sums, np.minimum(seen, size), axis=1)
            beyond = np.maximum(seen - size, 0)
            if beyond.any():
                beyond = beyond if xp is np else xp.cast(beyond, values.dtype)
                total = total + values[:, -1:] * beyond
        return slack * xp.max(total, axis=1)

    total = shift[:, 0] + xp.log(largest(lambda part: xp.exp(part - shift)))
    # Key j is seen by as many queries on either side as query N - 1 - j sees keys.
    columns = largest(lambda part: _share(part, xp))
    entropies = largest(lambda part: log_lambert(part - 1.0, xp))
    keys = queries = total
    if n_keys is not None:
        keys = xp.minimum(total, peak + math.log(n_keys))
    if n_queries is not None:
        queries = xp.minimum(total, peak + math.log(n_queries))
        columns = xp.minimum(columns, n_queries * _share(peak, xp))
        entropies = xp.minimum(entropies, n_queries * log_lambert(peak - 1.0, xp))
    return KeyWeights(keys, queries, columns, entropies)


def seen_by_lag(
    table: typing.Any,
    tokens: int | None,
    use_causal_mask: bool,
    sliding_window: int | None,
    xp: typing.Any,
) -> tuple[SeenByLag, SeenByLag]:
    """What queries see before them and after them, a pair of `SeenByLag`.

    Args:
        table: Logarithms of weights, shape `(H, 2 * R)`, see `biases_by_lag`.
        tokens: Largest number of tokens; `None` if a window is all there is.
        use_causal_mask: Whether later tokens are hidden.
        sliding_window: `None`, or the distance from which on tokens are hidden.
        xp: Array namespace, `numpy` or `keras.ops`.
    """
    reach = table.shape[1] // 2
    count = min(limit - 1 for limit in (tokens, sliding_window) if limit is not None)
    near = min(count, reach)
    before = SeenByLag(table[:, reach : reach + near], count)
    if use_causal_mask:
        return before, SeenByLag(table[:, :0], 0)
    return before, SeenByLag(xp.flip(table[:, reach - near : reach], axis=1), count)


def weights_of_tokens(
    token_weights: npt.ArrayLike, relative_bias: npt.ArrayLike | None = None
) -> tuple[KeyWeights | None, str]:
    """Sums of weights of tokens, for any mask with diagonal.

    Args:
        token_weights: shape `(..., T)`, not negative; a weight of 0 is padding.
        relative_bias: shape `(H, 2 R)`, finite, added to the logarithms, see `biases_by_lag`.

    Returns:
        A pair: `KeyWeights`, or `None` where no query sees another token or a weight is not
        valid, and the reason why a weight is not valid, or an empty string.
    """
    weights = np.asarray(token_weights, np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0.0).all()):
        return None, "a weight of a token is negative, NaN or infinite"
    table = np.zeros((1, 2)) if relative_bias is None else np.asarray(relative_bias, np.float64)
    with np.errstate(divide="ignore"):
        logarithms = np.log(weights.reshape(-1, weights.shape[-1]))
    return weights_by_pair(logarithms, table), ""


def weights_by_pair(
    log_weights: npt.ArrayLike, table: npt.NDArray[np.float64]
) -> KeyWeights | None:
    """Sums for tokens with individual weights, on the host; every query sees every key.

    Args:
        log_weights: shape `(S, T)`, logarithms of the weights of the tokens, `-inf` for padding.
        table: shape `(H, 2 * R)`, added to the logarithms, see `biases_by_lag`.

    Returns:
        `KeyWeights`, the largest over the sequences, or `None` where no query sees another token.
    """
    found = []
    for sequence in np.asarray(log_weights, np.float64):
        places = np.flatnonzero(sequence > -np.inf)
        weights = sequence[places]
        blocks = []
        for start in range(0, len(places), _ROWS):
            part = slice(start, start + _ROWS)
            lag = places[part, None] - places
            relative = weights - weights[part, None] + biases_by_lag(table, lag)
            blocks.append(np.where(lag == 0, -np.inf, relative))
        found.append(_sums(blocks))
    found = [sums for sums in found if sums is not None]
    return KeyWeights(*np.max(found, axis=0)) if found else None


def weights_of_pairs(weights: npt.NDArray[np.float64]) -> KeyWeights | None:
    """Sums of a matrix of weights `(N, N)` with a diagonal of 1, for one head."""
    with np.errstate(divide="ignore"):
        logarithms = np.log(weights - np.eye(len(weights)))
    return _sums([logarithms[None]])


def biases_by_lag(
    table: npt.NDArray[np.float64], lag: npt.NDArray[np.integer[typing.Any]]
) -> npt.NDArray[np.float64]:
    """Biases `(H, ...)` at distances `lag = i - j`, `(...)`, on the host.

    Args:
        table: shape `(H, 2 * R)`: biases of the keys R to 1 positions after a query, then of those
            1 to R before it. Keys further away have the outermost bias, the own key has 0.
        lag: integers.
    """
    reach = table.shape[1] // 2
    table = np.insert(table, reach, 0.0, axis=1)
    return table[:, np.clip(lag, -reach, reach) + reach]


def log_lambert(x: typing.Any, xp: typing.Any) -> typing.Any:
    """Upper bound of `W0(exp(x))`, exact up to rounding; differentiable.

    Args:
        x: array of any shape.
        xp: array namespace, `numpy` or `keras.ops`.

    Returns:
        Array of the same shape, at least `W0(exp(-60))`.
    """
    # W0 is monotone, and smaller exponentials vanish in float32.
    x = xp.maximum(x, -60.0)
    # w = log(1 + exp(x)) is above, as w exp(w) >= exp(w) - 1.
    w = xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))
    # Newton's method for w + log(w) = x, from below after one step.
    for _ in range(4):
        w = w / (1.0 + w) * (1.0 + x - xp.log(w))
    # One step for w exp(w) = exp(x): it is convex, so the step ends above.
    return w / (1.0 + w) * w + xp.exp(x - w) / (1.0 + w)


def _between(log_total: typing.Any, beyond: typing.Any, xp: typing.Any) -> typing.Any:
    """Upper bound of Theorem 3.E (i): linear between points, each with the value of the next.

    The constant grows with the weight, so this is above it. Beyond the points it is `beyond`.
    """
    after = _values_of_points()[1:]
    last = len(after) - 1
    place = (log_total - _POINTS[0]) / _STEP
    # NaN is no index; `part` brings it back.
    index = xp.where(place == place, xp.clip(xp.floor(place), 0, last - 1), 0.0)
    part = xp.clip(place - index, 0.0, 1.0)
    if xp is np:
        index = index.astype(np.int64)
    else:
        after = xp.convert_to_tensor(after, dtype=log_total.dtype)
        index = xp.cast(index, "int32")
    low, high = xp.take(after, index), xp.take(after, index + 1)
    return xp.where(place < last, low + part * (high - low), beyond)


@functools.cache
def _values_of_points() -> npt.NDArray[np.float64]:
    return np.array(weighted_bounds(np.exp(_POINTS).tolist()))


def _on_cells(weights: KeyWeights) -> npt.NDArray[np.float64]:
    """Theorem 3.E (i) of every head, `(H,)`."""
    pairs = np.stack([weights.log_keys, weights.log_queries], axis=1)
    return np.array(
        [
            weighted_bound(*(_CERTIFIED * np.exp(pair)))
            if np.max(np.abs(pair)) < _MOST
            else math.inf
            for pair in pairs
        ]
    )


def _numbers_seen(before, after, tokens):
    """Numbers of keys seen on either side, for queries that include one with the largest sum.

    Between these positions all sums are linear.
    """
    if tokens is None:
        return np.array([before.count]), np.array([after.count])
    near = [np.arange(side.log_weights.shape[1] + 1) for side in (before, after)]
    rows = np.concatenate(
        [near[0], [before.count], tokens - 1 - near[1], [tokens - 1 - after.count], [tokens - 1, 0]]
    )
    rows = np.unique(np.clip(rows, 0, tokens - 1))
    return np.minimum(rows, before.count), np.minimum(tokens - 1 - rows, after.count)


def _sums(blocks):
    """`KeyWeights` from logarithms of weights in blocks of queries, `(H, R, T)`."""
    rows, columns = [], []
    for block in blocks:
        rows.append(_log_sum(block, axis=2).max(axis=1))
        entropies = np.where(block > -np.inf, log_lambert(block - 1.0, np), 0.0)
        sums = _share(block, np).sum(axis=1), entropies.sum(axis=1)
        columns.append((_log_sum(block, axis=1), *sums))
    log_keys = np.max(rows, axis=0) if rows else np.array(-np.inf)
    if not (log_keys > -np.inf).any():
        return None
    log_queries, shares, entropies = (np.stack(parts) for parts in zip(*columns, strict=True))
    return KeyWeights(
        log_keys,
        np.logaddexp.reduce(log_queries, axis=0).max(axis=1),
        shares.sum(axis=0).max(axis=1),
        entropies.sum(axis=0).max(axis=1),
    )


def _share(log_weight, xp):
    """`w / (1 + w)`."""
    small = xp.exp(-xp.abs(log_weight))
    return xp.where(log_weight > 0.0, 1.0, small) / (1.0 + small)


def _log_sum(values, axis):
    peak = np.max(values, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.exp(values - peak), axis=axis)) + np.squeeze(peak, axis)
