"""Theorem 3.F of docs/theory.md: the 2-norm where the weights of keys are not extreme."""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.key_weights import SeenByLag
from keras_lipattn.bounds.unit_head import ordered_bound, symmetric_bound, unit_head_bound
from keras_lipattn.bounds.visible_pairs import Cliques

# Covers the rounding of weights that were float32, and of sums of them.
_SLACK = 1.0 + 1e-6
# With a larger spread of the logarithms Theorem 3.E is smaller; larger weights overflow.
_MOST_SPREAD, _LARGEST = 12.0, 100.0
# For longer sequences sums over positions are replaced by the largest weight.
_LONGEST = 1 << 16


def mild_constants(
    before: SeenByLag,
    after: SeenByLag,
    tokens: int | None,
    n_keys: npt.ArrayLike,
    structure: typing.Mapping[str, typing.Any],
) -> npt.NDArray[np.float64]:
    """Constants of the unit head in the 2-norm for biases by relative position.

    Without biases it is the constant of `unit_head_bound`.

    Args:
        before: weights of the keys before a query, see `SeenByLag`.
        after: the same after it.
        tokens: largest number of tokens, or `None` when unknown.
        n_keys: largest sum of the weights of the other keys of a query, shape `(H,)`.
        structure: arguments `mask`, `n_keys`, `n_queries` and `cliques` of `unit_head_bound`.

    Returns:
        Shape `(H,)`, `inf` where the theorem does not apply.
    """
    mask, cliques = structure["mask"], structure.get("cliques")
    everything = np.concatenate([before.log_weights, after.log_weights], axis=1)
    values = np.full(len(everything), np.inf)
    if cliques is None:
        if mask == "any" or tokens is None:
            return values
        cliques = Cliques(math.sqrt(tokens - 1.0), mask == "full")
    size = min(before.log_weights.shape[1], after.log_weights.shape[1])
    gaps = np.abs(before.log_weights[:, :size] - after.log_weights[:, :size])
    asymmetry = np.exp(np.minimum(gaps.max(axis=1, initial=0.0), _MOST_SPREAD))
    totals = np.broadcast_to(np.asarray(n_keys, np.float64), len(everything))
    for head, logs in enumerate(everything):
        if not logs.any():
            values[head] = unit_head_bound(tokens, **structure).value
            continue
        if not (np.ptp(logs) <= _MOST_SPREAD and np.abs(logs).max() <= _LARGEST):
            continue
        least, most = math.exp(logs.min()) / _SLACK, math.exp(logs.max()) * _SLACK
        total, root = float(totals[head]) * _SLACK, most * cliques.root
        if mask == "causal" and after.count == 0 and tokens <= _LONGEST:
            values[head] = _causal(before.log_weights[head], tokens, least, most)
        elif cliques.symmetric:
            if mask == "full" and tokens <= _LONGEST:
                root = _SLACK * _root(before.log_weights[head], after.log_weights[head], tokens)
            values[head] = symmetric_bound(
                total, root, least=least, asymmetry=_SLACK * float(asymmetry[head])
            )
        else:
            block = np.array([total]), np.array([root])
            values[head] = ordered_bound(block, block, least=least)
    return values


def _root(before: np.ndarray, after: np.ndarray, tokens: int) -> float:
    """Largest root of the sum of squares of the weights of a key, for a full mask."""
    sums = [np.cumsum(np.exp(2.0 * _by_distance(side, tokens))) for side in (before, after)]
    earlier, later = (np.concatenate([[0.0], one]) for one in sums)
    # As many queries on either side see key `j` as query `N - 1 - j` sees keys.
    return math.sqrt(float((earlier + later[::-1]).max()))


def _causal(logs: np.ndarray, tokens: int, least: float, most: float) -> float:
    """The theorem for a causal mask, in blocks of positions as Theorem 3.C."""
    sums = np.concatenate([[0.0], np.cumsum(np.exp(_by_distance(logs, tokens)))]) * _SLACK
    ends = np.unique(np.round(np.geomspace(1, tokens, 120)).astype(np.int64))
    starts = np.concatenate([[0], ends[:-1]])
    blocks = sums[ends - 1], most * np.sqrt(tokens - starts - 1.0)
    positions = np.union1d(ends[:: max(1, len(ends) // 24)], ends[-1:])
    sampled = sums[positions - 1], most * np.sqrt(tokens - positions + 0.0)
    return ordered_bound(sampled, blocks, least=least)


def _by_distance(logs: np.ndarray, tokens: int) -> np.ndarray:
    """Logarithms of the weights at the distances 1 to `tokens - 1`."""
    return np.pad(logs, (0, max(0, tokens - 1 - len(logs))), mode="edge")[: tokens - 1]
