"""Attention whose tokens lie in a ball, and Theorem 4.2 for attention by distance.

The constants depend neither on the length nor, in the token norm, on masks and biases of the
scores. Formulas take the array namespace `xp` (`numpy` on the host, `keras.ops` in a graph), so
that one line serves caps, penalties and certificates. Arrays of one number for each head have shape
`(H,)`.

`tensors` is the number of tensors that attention is called on: 1 for self-attention, 2 where keys
and values are another tensor than the queries, 3 where all may differ.
"""

import math
import typing

from keras_lipattn.bounds.column_sums import column_masses, log_measure_mass
from keras_lipattn.bounds.multihead import (
    Norms,
    bound_linf,
    safe_sqrt,
)
from keras_lipattn.linalg import SAFETY

BALL = "Theorem 4.2"
# Where `2 rho s + sqrt(1 + 4 s^2 (4 rho^2 - 1))` is largest at `s = rho`: from this `rho^2` on.
_EDGE = (7.0 - math.sqrt(13.0)) / 24.0


class BallTerms(typing.NamedTuple):
    """Largest change of a head per unit of change of its inputs, for one query.

    Changes of keys and values are measured by `sqrt(sum_j P_ij |change_j|^2)`.

    Args:
        query: of the query.
        key: of the keys.
        value: of the values.
        shared: of one tensor that is both keys and values.
        joint: of one tensor that is queries, keys and values, in the token norm.
        scores: the part that goes through the scores, largest changes of all keys.
    """

    query: typing.Any
    key: typing.Any
    value: typing.Any
    shared: typing.Any
    joint: typing.Any
    scores: typing.Any


def distance_terms(radius: typing.Any, xp: typing.Any) -> BallTerms:
    """Theorem 4.2: `softmax_j(-|y_i - y_j|^2 + b_ij) y` for tokens in a ball about the origin.

    Args:
        radius: `rho`, shape `(H,)`.
        xp: array namespace.
    """
    square = radius * radius
    # Larger balls have larger constants: those from rho = 1/2 on hold below as well.
    q = xp.maximum(square, 0.25)
    t = 2.0 * q / (2.0 * q - 1.0 + xp.sqrt(xp.square(2.0 * q - 1.0) + 12.0 * xp.square(q)))
    shared = xp.sqrt(_squares(q, t))
    small = xp.minimum(square, _EDGE)
    inner = xp.sqrt(1.0 + small / (1.0 - 4.0 * small))
    edge = 2.0 * square + xp.sqrt(1.0 + 4.0 * square * (4.0 * square - 1.0))
    joint = xp.minimum(xp.where(square < _EDGE, inner, edge), _joint(q, xp))
    ones = xp.ones_like(square)
    return BallTerms(2.0 * square, 4.0 * square, ones, shared, joint, 5.0 * square)


def _squares(q, t):
    """`sum_j P_ij |a_ij|^2` of Theorem 4.2 at most, for `rho^2 = q` and `S = 1 - t^2`."""
    return 1.0 + 4.0 * q * (1.0 - t * t) * (2.0 * q * (1.0 + t) - 1.0)


def _joint(q, xp: typing.Any):
    """Largest `2 q sqrt(1 - t^2) + sqrt(_squares(q, t))` for `t` in [0, 1], from above.

    For all positive `a` and `b` it is at most `q ((1 - t^2) / a + a) + (_squares(q, t) / b + b) /
    2`. That is a polynomial of degree three, whose largest value is known. The best `a` and `b`
    are found by iteration.
    """
    t = 0.3 * xp.ones_like(q)
    bound = None
    for _ in range(3):
        a, b = xp.sqrt(1.0 - t * t), xp.sqrt(_squares(q, t))
        slope = 4.0 * q * q / b
        start = q / a + slope - 2.0 * q / b
        t = xp.minimum(slope / (start + xp.sqrt(start * start + 3.0 * slope * slope)), 1.0)
        bound = q * ((1.0 - t * t) / a + a) + 0.5 * (_squares(q, t) / b + b)
    return bound


def combined(
    terms: BallTerms, norm: str, xp: typing.Any, *, mass: typing.Any = 1.0, tensors: int = 1
) -> typing.Any:
    """Constants of heads with respect to all their inputs side by side, shape `(H,)`.

    Args:
        terms: the terms of the heads.
        norm: `"l2"` or `"token"`.
        xp: array namespace.
        mass: `chi`, an upper bound of the column sums of the attention matrix, for `"l2"`.
        tensors: see the module.
    """
    if norm == "token":
        if tensors == 1:
            return terms.joint
        return terms.query + (terms.shared if tensors == 2 else terms.key + terms.value)
    root = xp.sqrt(mass)
    if tensors == 2:
        return xp.sqrt(xp.square(terms.query) + xp.square(root * terms.shared))
    return terms.query + root * (terms.shared if tensors == 1 else terms.key + terms.value)


def in_entries(terms: BallTerms, widths: tuple[int, int, int], xp: typing.Any) -> BallTerms:
    """The terms for inputs whose entries change by at most 1: `|x| <= sqrt(D) max |x|`.

    Args:
        terms: the terms of the heads.
        widths: features of queries, keys and values.
        xp: array namespace.
    """
    query, key, value = (math.sqrt(width) for width in widths)
    return BallTerms(
        query * terms.query,
        key * terms.key,
        value * terms.value,
        max(key, value) * terms.shared,
        query * terms.joint,
        query * terms.scores,
    )


def distance_constants(
    radius: typing.Any,
    norm: str,
    xp: typing.Any,
    *,
    tokens: int | None,
    mask: str,
    n_queries: int | None = None,
    relative_bias: typing.Any = None,
    causal: bool = False,
    tensors: int = 1,
    exact: bool = False,
) -> tuple[typing.Any, typing.Any]:
    """Constants of heads on balls, and their score parts for Theorem 5.3, each of shape `(H,)`.

    Args:
        radius: `rho` of Theorem 4.2, shape `(H,)`.
        norm: `"l2"`, `"token"` or `"linf"` (the row constants of Theorem 5.3).
        xp: array namespace.
        tokens: largest number of queries, `None` if unknown.
        mask: `"full"`, `"causal"` or `"any"`.
        n_queries: for `mask="any"`, the largest number of queries that see a key.
        relative_bias: see `column_masses`.
        causal: see `column_masses`.
        tensors: see the module.
        exact: see `column_masses`.
    """
    terms = distance_terms(radius, xp)
    if norm != "l2":
        return combined(terms, "token", xp, tensors=tensors), terms.scores
    square = xp.square(radius)
    mass = column_masses(
        4.0 * square,
        tokens,
        mask,
        xp,
        relative_bias=relative_bias,
        causal=causal,
        tensors=tensors,
        n_queries=n_queries,
        exact=exact,
    )
    if mask == "full" and tensors == 1 and relative_bias is None:
        # Tokens of equal weight are their own keys.
        mass = xp.minimum(mass, xp.exp(log_measure_mass(2.0 * square, xp)))
    return combined(terms, "l2", xp, mass=mass, tensors=tensors), terms.scores


def distance_layer_bound(
    b: typing.Any,
    c: typing.Any,
    constants: typing.Any,
    scores: typing.Any,
    *,
    norm: str,
    scale: typing.Any,
    norms: Norms,
    xp: typing.Any,
) -> typing.Any:
    """Theorems 5.1 to 5.3 with a constant for each head, for use in a graph.

    Args:
        b: shape `(H, D, k)`.
        c: shape `(H, k, O)`.
        constants: of the heads, shape `(H,)`.
        scores: the score parts of Theorem 5.3, shape `(H,)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        scale: scaling of the heads, shape `(H,)`.
        norms: those of `layer_matrices`, and `"head_query"` for `"l2"` too.
        xp: array namespace.

    Returns:
        A scalar of the namespace.
    """
    if norm == "linf":
        rows, parts = xp.expand_dims(constants, 1), xp.expand_dims(scores, 1)
        return bound_linf(b, c, rows, parts, norms, xp)
    heads = xp.square(scale * constants * norms["head_query"])
    inner = safe_sqrt(xp.sum(heads), xp)
    if norm == "l2":
        inner = xp.minimum(inner, xp.max(constants) * norms["concatenated_query"])
    return norms["stacked_output"] * inner


def terms_by_input(terms: BallTerms, separate_key: bool) -> dict[str, typing.Any]:
    """The terms of query, value and key, by name; without `separate_key` the value is the key."""
    if not separate_key:
        return {"query": terms.query, "value": terms.shared}
    return {"query": terms.query, "value": terms.value, "key": terms.key}


def projection_constant(norm: str, width: int) -> float:
    """Constant of the projection of tokens onto a ball about the origin, exact in every norm."""
    return 1.0 if norm != "linf" else SAFETY * 0.5 * (1.0 + math.sqrt(width))
