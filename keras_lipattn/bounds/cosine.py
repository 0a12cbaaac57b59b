"""Theorem 7.3 of docs/theory.md: from the kernels of scaled cosine attention to its constant.

A layer is `X -> sum_h P_h V^_h C_h + constant` with `P_h = softmax(tau q^_i . k^_j)`, where every
query, key and value is divided by `sqrt(|z|^2 + epsilon)`. As in `multihead`, `cosine_matrices`
names the matrices whose operator norms the bound needs, and the formulas take these norms and the
array namespace `xp` as arguments.

Shapes: `a` is `(H, D, k)`, `g` is `(H, D, k + v)`, see `fold`; `c` is `(H, v, O)`; a scaling is
`(H,)`, positive.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.column_sums import column_mass
from keras_lipattn.bounds.head_scaling import (
    balancing_powers,
    frobenius_scaling,
    polished_scaling,
    scaled_back,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import Norms, norm_2_to_1, safe_sqrt
from keras_lipattn.linalg import cached_by_content, operator_norm
from keras_lipattn.linalg.precision import SMALLEST_NORMAL

THEOREM = "Theorem 7.3"


def fold(query, key, value, *, temperature: float, epsilon: float, xp: typing.Any):
    """The matrices of the theorem, `A_h = tau W_Q / sqrt(eps)`, `G_h = [tau W_K, W_V] / sqrt(eps)`.

    Args:
        query: shape `(H, D, k)`.
        key: shape `(H, D, k)`.
        value: shape `(H, D, v)`.
        temperature: `tau >= 0`, the factor of the cosines.
        epsilon: the `epsilon > 0` inside the roots.
        xp: array namespace.

    Returns:
        A pair of shapes `(H, D, k)` and `(H, D, k + v)`.
    """
    slope = 1.0 / math.sqrt(epsilon)
    shared = xp.concatenate([key * (temperature * slope), value * slope], axis=2)
    return query * (temperature * slope), shared


def visible_mass(
    temperature: float, tokens: int | None, mask: str, n_queries: int | None = None
) -> float:
    """`chi`, an upper bound of the column sums of the attention matrix.

    Args:
        temperature: `tau`; logits differ by at most `2 tau`.
        tokens: largest number of tokens, or `None` when unknown.
        mask: `"full"`, `"causal"` (either with padding) or `"any"`.
        n_queries: for `mask="any"`, the largest number of other queries that see a key.
    """
    seen = None if n_queries is None else n_queries + 1
    return column_mass(2.0 * temperature, tokens, mask, n_queries=seen)


def cosine_matrices(a, g, c, norm: str, xp: typing.Any, scale=None) -> dict[str, typing.Any]:
    """The matrices whose operator norms the bound of a layer needs.

    - `"stacked_output"`: `stack(C_h / s_h)`, shape `(H*v, O)`;
    - `"concatenated_query"` and `"concatenated_key_value"`: `[s_h A_h]` and `[s_h G_h]`, shapes
      `(D, H*k)` and `(D, H*(k+v))`;
    - `"head_query"` and `"head_key_value"`: all `A_h`, all `G_h`, batches of `H` matrices.

    Args:
        a: shape `(H, D, k)`.
        g: shape `(H, D, k + v)`.
        c: shape `(H, v, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        xp: array namespace, `numpy` or `keras.ops`.
        scale: scaling of the heads, shape `(H,)`; `cosine_scaling` by default.

    Returns:
        Dictionary of those that the bound in `norm` needs.
    """
    if norm == "linf":
        return {"head_query": a, "head_key_value": g}
    if scale is None:
        scale = cosine_scaling(a, g, c, xp)
    matrices = {
        "stacked_output": _stacked(c, scale, xp),
        "concatenated_query": _concatenated(a, scale, xp),
    }
    if norm == "l2":
        return {**matrices, "concatenated_key_value": _concatenated(g, scale, xp)}
    return {**matrices, "head_key_value": g}


def cosine_scaling(a, g, c, xp: typing.Any) -> typing.Any:
    """The scaling of the heads of a graph, shape `(H,)`."""
    return frobenius_scaling(xp.concatenate([a, g], axis=2), c, xp)


def cosine_layer_bound(
    a, g, c, *, norm: str, mass: float, norms: Norms, xp: typing.Any
) -> typing.Any:
    """The theorem with one scaling of the heads, for use in a graph.

    With exact norms it is a valid upper bound, never below `certified_cosine_bound`.

    Args:
        a: shape `(H, D, k)`.
        g: shape `(H, D, k + v)`.
        c: shape `(H, v, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        mass: `chi`; only the 2-norm needs it.
        norms: operator norms of `cosine_matrices`.
        xp: array namespace, `numpy` or `keras.ops`.

    Returns:
        A scalar of the namespace.

    Raises:
        ValueError: if `mass` is infinite and needed.
    """
    if norm == "linf":
        return _linf(a, g, c, norms, xp)
    if norm == "l2" and math.isinf(mass):
        raise ValueError(f"A graph needs a number of tokens. Received: mass={mass}")
    scale = cosine_scaling(a, g, c, xp) if norm == "token" else None
    return _scaled(scale, norm, mass, norms, xp)


def certified_cosine_bound(
    a: npt.ArrayLike,
    g: npt.ArrayLike,
    c: npt.ArrayLike,
    *,
    norm: str,
    temperature: float,
    tokens: int | None,
    mask: str = "full",
    n_queries: int | None = None,
) -> LipschitzBound:
    """Certified Lipschitz bound of scaled cosine attention for all inputs: Theorem 7.3.

    Args:
        a: shape `(H, D, k)`, see `fold`.
        g: shape `(H, D, k + v)`.
        c: shape `(H, v, O)`, the output kernel by heads.
        norm: `"l2"`, `"token"` or `"linf"`.
        temperature: `tau`.
        tokens: largest number of tokens, or `None` when unknown.
        mask: `"full"`, `"causal"` (either with padding) or `"any"`.
        n_queries: see `visible_mass`.

    Returns:
        A `LipschitzBound`; `inf` with a reason when kernels are not finite, or when the norm is
        `"l2"` and the number of tokens is not known.
    """
    a, g, c = (np.asarray(matrix, np.float64) for matrix in (a, g, c))
    mass = visible_mass(temperature, tokens, mask, n_queries) if norm == "l2" else 1.0
    reason = ""
    if not all(np.isfinite(matrix).all() for matrix in (a, g, c)):
        reason = "the kernels hold NaN or infinite entries"
    elif math.isinf(mass):
        reason = "the number of tokens is not known"
    value = math.inf
    if not reason:
        inputs, outputs = (
            np.abs(matrix).max(axis=(1, 2)) for matrix in (np.concatenate([a, g], axis=2), c)
        )
        powers = balancing_powers(inputs, outputs)[:, None, None]
        a, g, c = np.ldexp(a, powers), np.ldexp(g, powers), np.ldexp(c, -powers)
        size = max(float(np.abs(a).max()), float(np.abs(g).max()), SMALLEST_NORMAL)
        size_c = max(float(np.abs(c).max()), SMALLEST_NORMAL)
        # With kernels of size 1 squares neither overflow nor underflow.
        unscaled = cached_by_content(_best_cosine, norm, mass, a / size, g / size, c / size_c)
        value, reason = scaled_back(unscaled, size, size_c)
    theorem = "" if reason else THEOREM
    return LipschitzBound(value=value, norm=norm, kind="certified", theorem=theorem, reason=reason)


def _best_cosine(norm: str, mass: float, a: np.ndarray, g: np.ndarray, c: np.ndarray) -> float:
    """Smallest bound over a few scalings of the heads, with exact norms."""
    if norm == "linf":
        return float(_linf(a, g, c, _exact_norms(cosine_matrices(a, g, c, norm, np)), np))
    joint = np.concatenate([a, math.sqrt(mass) * g], axis=2)
    start = frobenius_scaling(joint, c, np)
    scalings = [start]
    if len(c) > 1:
        scalings.append(polished_scaling(norm, joint, c, start)[0])
    if norm == "token":
        return min(
            float(_scaled(s, norm, mass, _exact_norms(cosine_matrices(a, g, c, norm, np, s)), np))
            for s in scalings
        )
    return min(
        operator_norm(_stacked(c, s, np)) * operator_norm(_concatenated(joint, s, np))
        for s in scalings
    )


def _scaled(scale, norm, mass, norms, xp):
    own = xp.square(norms["concatenated_query"])
    if norm == "l2":
        others = mass * xp.square(norms["concatenated_key_value"])
    else:
        others = xp.sum(xp.square(scale * norms["head_key_value"]))
    return norms["stacked_output"] * safe_sqrt(own + others, xp)


def _linf(a, g, c, norms, xp):
    own = norm_2_to_1(a, norms["head_query"], xp)
    others = norm_2_to_1(g, norms["head_key_value"], xp)
    heads = safe_sqrt(xp.square(own) + xp.square(others), xp)
    columns = safe_sqrt(xp.sum(xp.square(c), axis=1), xp)
    return xp.max(xp.sum(xp.expand_dims(heads, 1) * columns, axis=0))


def _exact_norms(matrices):
    return {name: operator_norm(matrix) for name, matrix in matrices.items()}


def _stacked(c, scale, xp):
    return xp.reshape(c / xp.reshape(scale, (-1, 1, 1)), (c.shape[0] * c.shape[1], c.shape[2]))


def _concatenated(b, scale, xp):
    """`(H, D, k)` as one matrix `(D, H*k)`."""
    wide = xp.transpose(b * xp.reshape(scale, (-1, 1, 1)), (1, 0, 2))
    return xp.reshape(wide, (b.shape[1], b.shape[0] * b.shape[2]))
