"""Theorem 4.1 of docs/theory.md: the token norm of attention on weighted tokens."""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.bounds.token_norm import token_norm_bound

# Below this the proof of Theorem 4 asks for more; the constant is monotone, so it may stand in.
LEAST_OTHERS = 0.2


def weighted_token_bound(token_weights: npt.ArrayLike) -> float:
    """Constant of the unit head in the token norm, for keys with weights.

    Args:
        token_weights: shape `(..., T)`, not negative; a weight of 0 is padding.

    Returns:
        `1 + 4 W0(n exp(-3/2))` with `n` the largest weight of the other tokens, relative to
        the own one; `inf` when a weight is NaN, infinite or negative.
    """
    weights = np.asarray(token_weights, np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0.0).all()):
        return math.inf
    # Relative to the largest of the sequence, so that sums do not overflow.
    peak = np.max(weights, axis=-1, keepdims=True, initial=0.0)
    positive = weights > 0.0
    weights = weights / np.where(peak > 0.0, peak, 1.0)
    others = np.sum(weights, axis=-1, keepdims=True) - weights
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.where(positive, others / weights, 0.0)
    # An allowance for the rounding of the sum, and of weights that come by way of float32.
    most = (1.0 + 1e-6) * float(np.max(relative, initial=0.0))
    return token_norm_bound(max(most, LEAST_OTHERS)) if math.isfinite(most) else math.inf


def weighted_layer_bound(
    b: npt.ArrayLike,
    c: npt.ArrayLike,
    *,
    norm: str,
    token_weights: npt.ArrayLike,
    **allowances: typing.Any,
) -> LipschitzBound:
    """Certified bound of a layer whose keys have weights; only the token norm has one.

    Args:
        b: shape `(H, D, k)`, see `certified_layer_bound`.
        c: shape `(H, k, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        token_weights: see `weighted_token_bound`.
        **allowances: `product_scale`, `query_error`, `product_error` of `certified_layer_bound`.

    Returns:
        A `LipschitzBound`, `inf` with the reason in the other norms.
    """
    reason = "tokens with weights have a constant in the token norm only"
    constant = weighted_token_bound(token_weights) if norm == "token" else math.inf
    if norm == "token" and math.isinf(constant):
        reason = "a weight of a token is negative, NaN or infinite, or far below the others"
    if math.isinf(constant):
        return LipschitzBound(
            value=constant, norm=norm, kind="certified", theorem="", reason=reason
        )
    return certified_layer_bound(
        b,
        c,
        norm=norm,
        tokens=None,
        head_constants=np.full(len(np.asarray(b)), constant),
        head_theorem="Theorem 4.1",
        **allowances,
    )
