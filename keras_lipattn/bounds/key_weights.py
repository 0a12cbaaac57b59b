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


def weights_by_lag(
    before: typing.Any,
    after: typing.Any,
    tokens: int | None,
    xp: typing.Any,
    *,
    n_keys: int | None = None,
    n_queries: int | None = None,
) -> KeyWeights | None:
    """Sums of weights that depend on the distance of two positions.

    Args:
        before: shape `(H, A)`, logarithms of the weights of the keys 1 to A positions before a
            query; those further away are hidden.
        after: shape `(H, C)`, the same after a query.
        tokens: largest number of tokens, or `None` if there may be any number.
        xp: array namespace, `numpy` or `keras.ops`.
        n_keys: most other keys a query sees, if fewer than all of these.
        n_queries: most other queries that see a key.

    Returns:
        `KeyWeights`, or `None` where no query sees another token.
    """
    reach = before.shape[1] + after.shape[1]
    if reach == 0 or tokens == 1 or n_keys == 0 or n_queries == 0:
        return None
    everything = xp.concatenate([before, after], axis=1)
    peak = xp.max(everything, axis=1)
    shift = peak[:, None] if xp is np else xp.stop_gradient(peak)[:, None]

    def largest(function):
        """Largest sum of a row: what is before position `i` and what is after it."""
        sums = _prefixes(function(before), xp), _prefixes(function(after), xp)
        if tokens is None:
            return sums[0][:, -1] + sums[1][:, -1]
        row = np.arange(tokens)
        first = xp.take(sums[0], np.minimum(row, before.shape[1]), axis=1)
        second = xp.take(sums[1], np.minimum(tokens - 1 - row, after.shape[1]), axis=1)
        return xp.max(first + second, axis=1)

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


def _prefixes(values, xp):
    """Sums of the first 0, 1, 2, ... values, `(H, A + 1)`."""
    return xp.pad(xp.cumsum(values, axis=1), ((0, 0), (1, 0)))


def _share(log_weight, xp):
    """`w / (1 + w)`."""
    return 0.5 * (1.0 + xp.tanh(0.5 * log_weight))


def _log_sum(values, axis):
    peak = np.max(values, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.exp(values - peak), axis=axis)) + np.squeeze(peak, axis)
