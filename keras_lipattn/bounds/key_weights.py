"""How much other keys weigh, relative to the own one, where keys have weights.

The constants of weighted attention (Theorems 3.E and 4.1 of docs/theory.md) see weights through
four sums, computed here on the host and in graphs by the same lines.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.scalars import log_lambert

# Rows of a matrix of weights that are looked at together.
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
        log_weights: shape `(H, R)`, of the keys at distance 1 to R; those further away weigh what
            the last one does.
        count: number of keys that are seen at most; `R` is no more than this.
    """

    log_weights: typing.Any
    count: int


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
        before: what a query sees before it.
        after: what it sees after it.
        tokens: largest number of tokens, or `None` if there may be any number.
        xp: array namespace, `numpy` or `keras.ops`.
        n_keys: most other keys a query sees, if fewer than all of these.
        n_queries: most other queries that see a key.
        epsilon: of the dtype that graphs sum in; sums have an allowance for their roundings then.

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
        """Largest sum of a row: what is before a position and what is after it."""
        total = 0.0
        for side, seen in zip(sides, numbers, strict=True):
            values, size = function(side.log_weights), side.log_weights.shape[1]
            if size == 0:
                continue
            sums = xp.pad(xp.cumsum(values, axis=1), ((0, 0), (1, 0)))
            total = total + xp.take(sums, np.minimum(seen, size), axis=1)
            beyond = np.maximum(seen - size, 0)
            if beyond.any():
                total = total + values[:, -1:] * _like(beyond, values, xp)
        return slack * xp.max(total, axis=1)

    total = shift[:, 0] + xp.log(largest(lambda part: xp.exp(part - shift)))
    # Key j is seen by the same number of queries on either side as query N - 1 - j sees keys.
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


def _numbers_seen(before, after, tokens):
    """How many keys are seen on either side, by the queries among which the largest sum is.

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


def _like(array, tensor, xp):
    return array if xp is np else xp.cast(array, tensor.dtype)


def biases_by_lag(
    table: npt.NDArray[np.float64], lag: npt.NDArray[np.integer[typing.Any]]
) -> npt.NDArray[np.float64]:
    """Biases `(H, ...)` at distances `lag = i - j`, `(...)`, on the host.

    Args:
        table: shape `(H, 2 * R)`: of the keys R to 1 positions after a query, then of those 1 to R
            before it; those further away share the last one, the own key has 0.
        lag: integers.
    """
    reach = table.shape[1] // 2
    table = np.insert(table, reach, 0.0, axis=1)
    return table[:, np.clip(lag, -reach, reach) + reach]


def weights_by_pair(
    log_weights: npt.ArrayLike, table: npt.NDArray[np.float64]
) -> KeyWeights | None:
    """Sums for tokens with weights of their own, on the host; all see all.

    Args:
        log_weights: shape `(S, T)`, logarithms of the weights of the tokens, `-inf` for padding.
        table: shape `(H, 2 * R)`, what is added to the logarithms, see `biases_by_lag`.

    Returns:
        `KeyWeights`, the largest over the sequences, or `None` where nobody sees another token.
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


def _sums(blocks):
    """Sums over logarithms of weights of some queries each, `(H, R, T)`, `-inf` for none."""
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


def weights_of_pairs(weights: npt.NDArray[np.float64]) -> KeyWeights | None:
    """Sums of a matrix of weights `(N, N)` with a diagonal of 1, for one head."""
    with np.errstate(divide="ignore"):
        logarithms = np.log(weights - np.eye(len(weights)))
    return _sums([logarithms[None]])


def _share(log_weight, xp):
    """`w / (1 + w)`."""
    small = xp.exp(-xp.abs(log_weight))
    return xp.where(log_weight > 0.0, 1.0, small) / (1.0 + small)


def _log_sum(values, axis):
    peak = np.max(values, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.exp(values - peak), axis=axis)) + np.squeeze(peak, axis)
