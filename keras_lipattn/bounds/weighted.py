"""Theorems 3.E and 4.1 of docs/theory.md: attention whose keys have weights."""

import functools
import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.any_mask import weighted_bound, weighted_bounds
from keras_lipattn.bounds.key_weights import KeyWeights, weights_by_pair
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.bounds.scalars import log_lambert
from keras_lipattn.bounds.unit_head import UnitBound
from keras_lipattn.linalg import SAFETY

# Below this the proof of Theorem 4 asks for more; the constant is monotone, so it may stand in.
LEAST_OTHERS = 0.2
# For the rounding of the sums of weights, in float64 and for weights that come by way of float32.
_CERTIFIED = 1.0 + 1e-6
# Graphs in float32 lose up to a millionth: theirs is above what the host takes for the same.
_ON_THE_HOST, _IN_A_GRAPH = 1.0 + 1.8e-5, 1.0 + 2e-5
# Logarithms of weights at which graphs know the constant that is evaluated on cells.
_STEP = 0.125
_POINTS = np.arange(-4.0, 12.0, _STEP)
# Beyond this squares in the cells of Theorem 3.E leave the range of float64.
_MOST = 300.0


def weighted_unit_bound(
    weights: KeyWeights | None, norm: str, xp: typing.Any, *, slack: float | None = None
) -> UnitBound:
    """Constants of the unit head with derivatives, for graphs and for whom must agree with them.

    Args:
        weights: `KeyWeights` of the heads, or `None` where nobody sees another token.
        norm: `"l2"`, `"token"` or `"linf"`.
        xp: array namespace, `numpy` or `keras.ops`.
        slack: factor for roundings; by default that of graphs, and a little less on the host.

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
    **others: typing.Any,
) -> LipschitzBound:
    """Certified bound of a layer whose keys have weights.

    Args:
        b: shape `(H, D, k)`, see `certified_layer_bound`.
        c: shape `(H, k, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        weights: `KeyWeights` of the heads, shape `(H,)` or `(1,)`; `None` where nobody sees
            another token.
        **others: `product_scale`, `query_error`, `product_error`, `published` of
            `certified_layer_bound`.

    Returns:
        A `LipschitzBound`, `inf` with the reason where weights are not finite.
    """
    heads = len(np.asarray(b))
    unit = weighted_unit_bound(weights, norm, np, slack=_CERTIFIED)
    constants = np.broadcast_to(weighted_constants(weights, norm), heads)
    scores = np.broadcast_to(SAFETY * np.asarray(unit.score_part), heads)
    return certified_layer_bound(
        b,
        c,
        norm=norm,
        tokens=None,
        head_constants=constants,
        head_scores=scores,
        head_theorem=unit.theorem or "the identity of a single token",
        **others,
    )


def weighted_constants(weights: KeyWeights | None, norm: str) -> npt.NDArray[np.float64]:
    """Certified constants of the unit head, one for each head of `weights`.

    Args:
        weights: see `weighted_unit_bound`.
        norm: `"l2"`, `"token"` or `"linf"` (the row constant of Theorem 5.3).
    """
    unit = weighted_unit_bound(weights, norm, np, slack=_CERTIFIED)
    constants = np.atleast_1d(SAFETY * np.asarray(unit.value))
    if weights is None or norm != "l2":
        return constants
    return np.minimum(constants, _cells(weights))


def weights_of_tokens(
    token_weights: npt.ArrayLike, relative_bias: npt.ArrayLike | None = None
) -> tuple[KeyWeights | None, str]:
    """What other keys weigh where tokens have weights, whoever sees whom.

    Args:
        token_weights: shape `(..., T)`, not negative; a weight of 0 is padding.
        relative_bias: shape `(H, 2 R)`, finite, added to the logarithms, see `biases_by_lag`.

    Returns:
        A pair: `KeyWeights`, or `None` where nobody sees another token, and the reason why there
        are none, empty where there is no reason.
    """
    weights = np.asarray(token_weights, np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0.0).all()):
        return None, "a weight of a token is negative, NaN or infinite"
    table = np.zeros((1, 2)) if relative_bias is None else np.asarray(relative_bias, np.float64)
    with np.errstate(divide="ignore"):
        logarithms = np.log(weights.reshape(-1, weights.shape[-1]))
    return weights_by_pair(logarithms, table), ""


def _between(log_total: typing.Any, beyond: typing.Any, xp: typing.Any) -> typing.Any:
    """Theorem 3.E (i), from above: linear between points that each have the value of the next.

    The constant grows with the weight, so this is above it. `beyond` is for more than the points.
    """
    after = _values_of_points()[1:]
    last = len(after) - 1
    place = (log_total - _POINTS[0]) / _STEP
    # NaN is no index; it comes back with `part`.
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


def _cells(weights: KeyWeights) -> npt.NDArray[np.float64]:
    """The constants of Theorem 3.E that are evaluated on cells, `(H,)`."""
    pairs = np.stack([weights.log_keys, weights.log_queries], axis=1)
    return np.array(
        [
            weighted_bound(*(_CERTIFIED * np.exp(pair)))
            if np.max(np.abs(pair)) < _MOST
            else math.inf
            for pair in pairs
        ]
    )
