"""Lipschitz constants of the unit head, the map `Y -> softmax(-|y_i - y_j|^2) Y`."""

import functools
import math
import typing

from keras_lipattn.bounds.any_mask import any_mask_bound
from keras_lipattn.bounds.causal_mask import causal_mask_bound
from keras_lipattn.bounds.closed_form import closed_form_bound, closed_form_degree_bound
from keras_lipattn.bounds.full_mask import full_mask_bound
from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.bounds.scalars import phi_inv
from keras_lipattn.bounds.token_norm import token_norm_bound
from keras_lipattn.linalg import SAFETY

MASKS = ("full", "causal", "any")
IDENTITY = "the identity of a single token"
UNKNOWN_LENGTH = (
    "the number of tokens is not known and the constant grows with it; state the sequence length"
)


class UnitBound(typing.NamedTuple):
    """Constant of the unit head and where it comes from.

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
) -> UnitBound:
    """Certified Lipschitz constant of the unit head.

    The mask must keep the diagonal, and padded tokens must be seen by nobody and give rows of
    zeros; `"full"` and `"causal"` then cover every shorter or padded sequence too.

    Args:
        tokens: largest number of tokens `N >= 1`, or `None` when unknown.
        mask: `"full"` (padding included), `"causal"`, or `"any"` (any mask with diagonal).
        norm: `"l2"`, `"token"` or `"linf"`.
        n_keys: for `mask="any"`, the largest number of *other* keys a query sees; `N - 1` by
            default.
        n_queries: for `mask="any"`, the largest number of *other* queries that see a key;
            `N - 1` by default.

    Returns:
        A `UnitBound` of Python floats, cached. When `tokens` is `None` the value is `inf`,
        except for `mask="any"` with the degrees that the norm needs.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> bound = keras_lipattn.bounds.unit_head_bound(64)
    >>> round(bound.value, 3), bound.theorem
    (8.697, 'Theorem 3.B')

    Reference: Theorems 3.A to 3.D, 4 and 5.3 of docs/theory.md; Kim, Papamakarios and Mnih,
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
        n_keys = n_queries = None
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
        return _l2_by_degrees(tokens, n_keys, n_queries)
    return _l2(tokens, mask)


@functools.lru_cache(maxsize=4096)
def _l2(tokens: int, mask: str) -> UnitBound:
    if tokens == 1:
        return UnitBound(1.0, IDENTITY)
    own = (full_mask_bound, "Theorem 3.B") if mask == "full" else (causal_mask_bound, "Theorem 3.C")
    return min(
        UnitBound(own[0](tokens), own[1]),
        UnitBound(closed_form_bound(tokens, mask), "Theorem 3.A"),
        _l2_by_degrees(tokens, tokens - 1, tokens - 1),
    )


@functools.lru_cache(maxsize=4096)
def _l2_by_degrees(tokens: int | None, n_keys: int, n_queries: int) -> UnitBound:
    if n_keys == 0 or n_queries == 0:
        return UnitBound(1.0, IDENTITY)
    candidates = [
        UnitBound(any_mask_bound(n_keys, n_queries), "Theorem 3.D"),
        UnitBound(closed_form_degree_bound(n_keys, n_queries), "Theorem 3.A"),
    ]
    if tokens is not None:
        published = SAFETY * math.sqrt(tokens) * (4.0 * phi_inv(n_keys) + 1.0)
        candidates.append(UnitBound(published, "Kim et al., Theorem 3.2"))
    return min(candidates)


def _whole(name: str, value: int | None, *, least: int) -> int | None:
    if value is None:
        return None
    if not float(value).is_integer() or value < least:
        raise ValueError(
            f"`{name}` must be an integer that is at least {least}. Received: {name}={value}"
        )
    return int(value)
