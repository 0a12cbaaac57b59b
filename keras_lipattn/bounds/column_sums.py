"""Upper bounds of the column sums of an attention matrix (section 7 of docs/theory.md).

The 2-norm of attention grows with the root of what one key gets from all queries. Rows sum to 1,
columns only to a number that depends on how much logits of a row differ and on the biases that are
added to them.
"""

import math
import typing

import numpy as np

from keras_lipattn.bounds.key_weights import seen_by_lag, weights_by_lag
from keras_lipattn.bounds.unit_head import MASKS

# Longest sum in a graph.
_MOST_TERMS = 64
# Graphs sum in float32 at least.
_EPSILON = float(np.finfo(np.float32).eps)


def column_mass(
    spread: float, tokens: int | None, mask: str, *, n_queries: int | None = None
) -> float:
    """`chi`, an upper bound of the column sums of the attention matrix (section 7).

    Args:
        spread: largest difference of two logits in a row, `>= 0`.
        tokens: number of tokens `N`, or `None` when unknown. For `mask="full"` all of them are
            valid as queries and as keys: padded tokens do not count.
        mask: `"full"`, `"causal"` or `"any"`.
        n_queries: for `mask="any"`, the largest number of queries that see a key; `N` by
            default.

    Returns:
        A float, `inf` when the length is unknown and matters.

    Raises:
        ValueError: if `mask` is unknown.
    """
    if mask not in MASKS:
        raise ValueError(f"`mask` must be one of {list(MASKS)}. Received: mask={mask!r}")
    least = math.exp(-spread)
    if mask == "full":
        if tokens is None:
            return 1.0 / least if least > 0.0 else math.inf
        return tokens / (1.0 + (tokens - 1) * least)
    if tokens is None:
        return math.inf if mask == "causal" or n_queries is None else float(n_queries)
    if mask == "causal":
        return float(np.sum(1.0 / (1.0 + np.arange(tokens) * least)))
    return float(tokens if n_queries is None else min(n_queries, tokens))


@np.errstate(over="ignore", invalid="ignore")
def column_masses(
    content: typing.Any,
    tokens: int | None,
    mask: str,
    xp: typing.Any,
    *,
    relative_bias: typing.Any = None,
    causal: bool = False,
    tensors: int = 1,
    n_queries: int | None = None,
    exact: bool = False,
) -> typing.Any:
    """`column_mass` of several heads, whose keys may have biases by relative position.

    Args:
        content: largest differences of two logits in a row without biases, shape `(H,)`.
        tokens: largest number of tokens, `None` if unknown.
        mask: `"full"`, `"causal"` or `"any"`.
        xp: array namespace.
        relative_bias: shape `(H, 2 R)`, see `biases_by_lag`, or `None`.
        causal: whether later tokens are known to be hidden.
        tensors: number of tensors that attention is between. In self-attention, 1, a query sees
            its own token, unless `mask` is `"any"`.
        n_queries: for `mask="any"`, the largest number of queries that see a key.
        exact: whether nothing is added for the rounding of a graph in float32.

    Returns:
        Shape `(H,)`, `inf` where the length is not known and matters.
    """
    if mask == "any" or (tokens is None and mask == "causal"):
        return column_mass(0.0, tokens, mask, n_queries=n_queries) * xp.ones_like(content)
    spread = content + bias_spread(relative_bias, xp)
    if tokens is None:
        return xp.exp(spread)
    mass = _without_positions(spread, tokens, mask, xp, exact)
    if relative_bias is None or tensors > 1:
        return mass
    # The own key weighs 1, the key at distance l at most exp(bias + content) in comparison.
    table = relative_bias + content[:, None]
    seen = seen_by_lag(table, tokens, causal, None, xp)
    weights = weights_by_lag(*seen, tokens, xp, epsilon=0.0 if exact else _EPSILON)
    return mass if weights is None else xp.minimum(mass, 1.0 + weights.columns)


def _without_positions(spread, tokens, mask, xp, exact):
    """The masses from the largest differences of two logits alone."""
    least = xp.exp(-spread) * (1.0 if exact else 1.0 - 2e-5)
    if mask == "full":
        return tokens / (1.0 + (tokens - 1) * least)
    if not exact and tokens > _MOST_TERMS:
        # The integral is above the sum, and no long sum is rounded.
        least = xp.maximum(least, 1e-30)
        return xp.minimum(1.0 + xp.log1p((tokens - 1) * least) / least, float(tokens))
    steps = np.arange(tokens, dtype=np.float64)
    steps = steps if xp is np else xp.convert_to_tensor(steps, dtype=spread.dtype)
    return xp.sum(1.0 / (1.0 + steps[None] * least[:, None]), axis=1)


def bias_spread(relative_bias: typing.Any, xp: typing.Any) -> typing.Any:
    """Largest difference of two biases in a row of the scores, `(H,)`; the own bias is 0.

    Args:
        relative_bias: shape `(H, 2 R)`, or `None`.
        xp: array namespace.
    """
    if relative_bias is None:
        return 0.0
    top = xp.maximum(xp.max(relative_bias, axis=1), 0.0)
    return top - xp.minimum(xp.min(relative_bias, axis=1), 0.0)


def log_measure_mass(product: typing.Any, xp: typing.Any) -> typing.Any:
    """Logarithm of the largest column sum for one measure of queries and keys in a ball.

    Theorem 4.3: weights are proportional to `exp(x . y)` or `exp(-|x - y|^2)`, and no number of
    tokens is needed.

    Args:
        product: the largest product of two tokens, `rho^2`; twice that for `exp(-|x - y|^2)`.
        xp: array namespace.
    """
    return 0.5 * (product + xp.maximum(product - 2.0, 0.0))
