"""Section 7 of docs/theory.md: attention that is Lipschitz because its tokens are bounded.

Ordinary dot-product attention on a ball (Theorem 7.1). Masks need not keep the diagonal here, but
every query must see a key.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.linalg import SAFETY, operator_norm

MASKS = ("full", "causal", "any")


class HeadConstants(typing.NamedTuple):
    """Constants of attention heads in two norms, each a float or an array of shape `(H,)`."""

    l2: typing.Any
    token: typing.Any


def column_mass(
    spread: float, tokens: int | None, mask: str, *, n_queries: int | None = None
) -> float:
    """`chi`, an upper bound of the column sums of the attention matrix.

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
def dot_product_constants(
    query_kernel: npt.ArrayLike,
    key_kernel: npt.ArrayLike,
    *,
    radius: float,
    tokens: int | None,
    mask: str = "full",
    scale: float | None = None,
    center: npt.ArrayLike | None = None,
    query_bias: npt.ArrayLike | None = None,
    n_queries: int | None = None,
) -> HeadConstants:
    """Theorem 7.1: constants of `X -> softmax(scale q_i . k_j) X` for tokens in a ball.

    The key's bias plays no role, neither does a bias of the values.

    Args:
        query_kernel: shape `(D, k)` or `(H, D, k)`, `q = x W_q + b_q`.
        key_kernel: shape of `query_kernel`.
        radius: radius `R` of the ball that holds every token.
        tokens: largest number of tokens, or `None` when unknown.
        mask: `"full"`, `"causal"` or `"any"`.
        scale: factor of the logits, `1 / sqrt(k)` by default.
        center: shape `(D,)`, centre of the ball, the origin by default.
        query_bias: shape `(k,)` or `(H, k)`.
        n_queries: see `column_mass`.

    Returns:
        `HeadConstants` of floats, or of arrays `(H,)` when the kernels have heads.

    Reference: compare Castin, Ablin and Peyre, "How smooth is attention?", ICML 2024.
    """
    query, key = np.asarray(query_kernel, np.float64), np.asarray(key_kernel, np.float64)
    if query.ndim not in (2, 3) or query.shape != key.shape:
        raise ValueError(
            "`query_kernel` and `key_kernel` must both have shape `(D, k)` or `(H, D, k)`. "
            f"Received: query_kernel.shape={query.shape}, key_kernel.shape={key.shape}"
        )
    center = np.zeros(query.shape[-2]) if center is None else np.asarray(center, np.float64)
    bias = np.zeros(query.shape[-1]) if query_bias is None else np.asarray(query_bias, np.float64)
    if not all(np.isfinite(array).all() for array in (query, key, center, bias, radius)):
        unbounded = np.full(query.shape[:-2], np.inf)
        return _constants(unbounded, unbounded)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    offset = center @ query + bias
    gain = SAFETY * np.asarray(operator_norm(scale * key @ np.swapaxes(query, -1, -2)))
    pull = np.linalg.norm(scale * (key @ offset[..., None])[..., 0], axis=-1)
    slope = SAFETY * (gain * radius + pull)
    mass = np.vectorize(
        lambda spread: column_mass(spread, tokens, mask, n_queries=n_queries), otypes=[float]
    )(2.0 * radius * slope)
    own = gain * radius**2
    mixed = np.hypot(1.0, slope * radius)
    return _constants(own + np.sqrt(mass) * mixed, own + mixed)


@np.errstate(over="ignore", invalid="ignore")
def combine_heads(output_kernels: npt.ArrayLike, constants: npt.ArrayLike) -> float:
    """Constant of `sum_h f_h T_h` for heads `f_h` that read the same input.

    Valid in the 2-norm and in the token norm, whichever the constants are in.

    Args:
        output_kernels: shape `(H, d, O)`, the matrices `T_h` (`W_V^h W_O^h` for Theorem 7.1).
        constants: shape `(H,)`, Lipschitz constants of the heads.

    Returns:
        A float: `min_s ||stack(T_h / s_h)|| sqrt(sum_h s_h^2 L_h^2)` over a few scalings, among
        them the one that never exceeds `sum_h ||T_h|| L_h`.
    """
    kernels = np.asarray(output_kernels, np.float64)
    constants = np.broadcast_to(np.asarray(constants, np.float64), kernels.shape[:1])
    if not np.isfinite(kernels).all() or not np.isfinite(constants).all():
        return math.inf
    sizes = np.asarray(operator_norm(kernels))
    # A head that is zero on either side needs no share; dropping it keeps scalings positive.
    used = (sizes > 0.0) & (constants > 0.0)
    if not used.any():
        return 0.0
    kernels, constants, sizes = kernels[used], constants[used], sizes[used]
    # Each head by itself first: between heads of very different sizes squares vanish or overflow.
    units = kernels / sizes[:, None, None]
    logs = np.log2(sizes), np.log2(constants)
    shares = logs[0] + logs[1]
    # Logarithms of `|T_h| / s_h` and `s_h L_h`, for `s_h` 1, `1 / L_h` and `sqrt(|T_h| / L_h)`.
    splits = logs, (shares, np.zeros_like(shares)), (0.5 * shares, 0.5 * shares)
    smallest = min(_product(units, left, right) for left, right in splits)
    # What is too small for a float is not 0.
    return max(SAFETY * smallest, float(np.finfo(np.float64).tiny))


def _product(units: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """`||stack(2^left_h units_h)|| |2^right|`, relative to the largest numbers."""
    tops = float(left.max()), float(right.max())
    weights = np.exp2(left - tops[0])[:, None, None]
    stacked = operator_norm((weights * units).reshape(-1, units.shape[-1]))
    return float(stacked * np.linalg.norm(np.exp2(right - tops[1])) * np.exp2(sum(tops)))


def _constants(l2: np.ndarray, token: np.ndarray) -> HeadConstants:
    l2, token = (np.where(np.isnan(value), np.inf, SAFETY * value) for value in (l2, token))
    return HeadConstants(float(l2), float(token)) if l2.ndim == 0 else HeadConstants(l2, token)
