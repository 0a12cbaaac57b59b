"""Section 7 of docs/theory.md: attention that is Lipschitz because its tokens are bounded.

Theorem 7.1 is about dot-product heads on a ball, Theorem 7.4 about a whole layer on an ellipsoid,
Theorem 7.7 about attention between different tensors. Masks need not keep the diagonal here, but
every query must see a key. Biases of keys, values and the output change no constant.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.column_sums import column_mass, column_masses
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.linalg import SAFETY, operator_norm
from keras_lipattn.linalg.precision import SMALLEST_NORMAL


class HeadConstants(typing.NamedTuple):
    """Constants of attention heads in two norms, each a float or an array of shape `(H,)`."""

    l2: typing.Any
    token: typing.Any


class CrossConstants(typing.NamedTuple):
    """Largest change of a head's output per unit of change of each of its inputs.

    The numbers hold for one query `i`, with changes of keys and values measured by
    `sqrt(sum_j P_ij |change_j|^2)`: that is at most the token norm of the change, and over all
    queries at most `sqrt(n_queries)` times its 2-norm.

    Args:
        query: of the queries.
        key: of the keys.
        value: of the values.
        shared: of one tensor that is both keys and values.
    """

    query: typing.Any
    key: typing.Any
    value: typing.Any
    shared: typing.Any


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

    Args:
        query_kernel: shape `(D, k)` or `(H, D, k)`, `q = x W_q + b_q`.
        key_kernel: shape of `query_kernel`.
        radius: radius `R` of the ball that holds every token.
        tokens: largest number of tokens, or `None` when unknown.
        mask: `"full"`, `"causal"` or `"any"`.
        scale: factor of the logits, `1 / sqrt(k)` by default.
        center: shape `(D,)`, center of the ball, the origin by default.
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
    offset = _query_offset(query, center, query_bias)
    if not all(np.isfinite(array).all() for array in (query, key, offset, radius)):
        unbounded = np.full(query.shape[:-2], np.inf)
        return _head_constants(unbounded, unbounded)
    gain, pull = _logit_slopes(query, key, offset, scale)
    slope = SAFETY * (gain * radius + pull)
    mass = np.vectorize(
        lambda spread: column_mass(spread, tokens, mask, n_queries=n_queries), otypes=[float]
    )(2.0 * radius * slope)
    own = gain * radius**2
    others = np.hypot(1.0, slope * radius)
    # The average and the change of the scores one by one, the second one by Schur's test.
    schur = _schur_mass(mass, tokens, n_queries if mask == "any" else None)
    apart = np.sqrt(mass) + np.sqrt(schur) * slope * radius
    return _head_constants(own + np.minimum(np.sqrt(mass) * others, apart), own + others)


# Numbers that overflow give `inf` at the end.
@np.errstate(over="ignore", invalid="ignore")
def dot_product_layer_constant(
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    value: npt.ArrayLike,
    output: npt.ArrayLike,
    *,
    norm: str,
    axes: npt.ArrayLike,
    tokens: int | None,
    mask: str = "full",
    scale: float | None = None,
    center: npt.ArrayLike | None = None,
    query_bias: npt.ArrayLike | None = None,
    relative_bias: np.ndarray | None = None,
    causal: bool = False,
    n_queries: int | None = None,
) -> float:
    """Theorem 7.4: `X -> sum_h softmax(scale q_i . k_j) X W_V W_O` for tokens in an ellipsoid.

    Tokens are `center + v @ axes` with `|v| <= 1`: the image of a ball under a linear map, such as
    the scales of a normalization. Theorem 7.1 would need the smallest ball around it and treats
    each head alone.

    Args:
        query: kernels, shape `(H, D, k)`.
        key: shape `(H, D, k)`.
        value: shape `(H, D, v)`.
        output: shape `(H, v, O)`.
        norm: `"l2"` or `"token"`.
        axes: shape `(r, D)`.
        tokens: largest number of tokens, or `None` when unknown.
        mask: `"full"`, `"causal"` or `"any"`.
        scale: factor of the logits, `1 / sqrt(k)` by default.
        center: shape `(D,)`, the origin by default.
        query_bias: shape `(H, k)`.
        relative_bias: shape `(H, 2 R)`, see `column_masses`.
        causal: see `column_masses`.
        n_queries: see `column_mass`.

    Returns:
        A float; `inf` where the numbers overflow or are not finite, or the length is not known
        and matters.
    """
    query, key, value, output, axes = (
        np.asarray(matrix, np.float64) for matrix in (query, key, value, output, axes)
    )
    heads, _, key_dim = query.shape
    scale = 1.0 / math.sqrt(key_dim) if scale is None else scale
    offset = scale * _query_offset(query, center, query_bias)
    query = query * scale
    if not all(np.isfinite(array).all() for array in (query, key, value, output, axes, offset)):
        return math.inf
    # The kernels as functions of `v`.
    inner_query, inner_key, inner_value = axes @ query, axes @ key, axes @ value
    # The derivative of a logit in its key, `key @ q_i`, lies in the image of the unit ball under
    # these matrices.
    pulls = np.stack([_reached(*parts) for parts in zip(key, inner_query, offset, strict=True)])
    slopes = SAFETY * operator_norm(pulls)
    # A matrix with orthonormal rows in front changes no norm, so triangular factors are enough.
    triangles = np.linalg.qr(inner_key, mode="r")
    inner_output = np.linalg.qr(inner_value, mode="r") @ output
    pairs = query @ np.swapaxes(triangles, 1, 2)
    queries = _split(pairs, inner_output)
    # A covariance on the unit ball is half of the identity, up to half of its size.
    joint = query @ (np.swapaxes(inner_key, 1, 2) @ inner_value) @ output
    queries = min(queries, 0.5 * (queries + float(operator_norm(joint.sum(axis=0)))))
    mass = np.ones(heads)
    if norm == "l2":
        spreads = [_reached(*parts) for parts in zip(inner_key, inner_query, offset, strict=True)]
        spreads = 2.0 * SAFETY * operator_norm(np.stack(spreads))
        mass = column_masses(
            spreads,
            tokens,
            mask,
            np,
            relative_bias=relative_bias,
            causal=causal,
            n_queries=n_queries,
            exact=True,
        )
    if not np.isfinite(mass).all():
        return math.inf
    both = np.concatenate([value, slopes[:, None, None] * inner_value], axis=1)
    others = combine_heads(np.linalg.qr(both, mode="r") @ output, np.sqrt(mass))
    if norm == "l2":
        # Two terms, as the kernels of all heads next to each other have one norm.
        roots = np.sqrt(mass)
        averages = combine_heads(np.linalg.qr(value, mode="r") @ output, roots)
        averages = min(averages, _split(roots[:, None, None] * value, output))
        seen = n_queries if mask == "any" else None
        schur = np.sqrt(_schur_mass(mass, tokens, seen))
        scores = _split(schur[:, None, None] * pulls, inner_output)
        others = min(others, averages + scores)
    total = SAFETY * (queries + others)
    return math.inf if math.isnan(total) else float(total)


@np.errstate(over="ignore", invalid="ignore")
def combine_heads(output_kernels: npt.ArrayLike, constants: npt.ArrayLike) -> float:
    """Constant of `sum_h f_h T_h` for heads `f_h` of one input, combined as in Theorem 7.1.

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
    # Heads that are zero are dropped, so that scalings stay positive.
    used = (sizes > 0.0) & (constants > 0.0)
    if not used.any():
        return 0.0
    kernels, constants, sizes = kernels[used], constants[used], sizes[used]
    # Sizes are kept apart as logarithms: squares of very different heads underflow or overflow.
    units = kernels / sizes[:, None, None]
    logs = np.log2(sizes), np.log2(constants)
    shares = logs[0] + logs[1]
    # Logarithms of `|T_h| / s_h` and `s_h L_h`, for `s_h` 1, `1 / L_h` and `sqrt(|T_h| / L_h)`.
    splits = logs, (shares, np.zeros_like(shares)), (0.5 * shares, 0.5 * shares)
    smallest = min(_product(units, left, right) for left, right in splits)
    # A constant that underflows is not 0.
    return max(SAFETY * smallest, SMALLEST_NORMAL)


@np.errstate(over="ignore", invalid="ignore")
def cross_attention_constants(
    query_kernel: npt.ArrayLike,
    key_kernel: npt.ArrayLike,
    *,
    query_radius: float,
    key_radius: float,
    value_radius: float,
    scale: float | None = None,
    query_center: npt.ArrayLike | None = None,
    query_bias: npt.ArrayLike | None = None,
) -> CrossConstants:
    """Theorem 7.7: heads `z -> sum_j P_ij z_j` with logits `scale (x_i W_q + b_q) . (y_j W_k)`.

    Queries `x_i`, keys `y_j` and values `z_j` lie in balls. The centers of the balls of keys and
    values change no constant. A row that averages its tokens in a fixed way is covered as well.

    Args:
        query_kernel: shape `(H, D, k)`.
        key_kernel: shape `(H, E, k)`.
        query_radius: radius of the ball that holds every query.
        key_radius: the same for keys.
        value_radius: the same for values.
        scale: factor of the logits, `1 / sqrt(k)` by default.
        query_center: shape `(D,)`, center of the ball of the queries, the origin by default.
        query_bias: shape `(H, k)`.

    Returns:
        `CrossConstants` of arrays `(H,)`; `inf` where a radius that matters is not finite.
    """
    query, key = np.asarray(query_kernel, np.float64), np.asarray(key_kernel, np.float64)
    gain, pull = _logit_slopes(query, key, _query_offset(query, query_center, query_bias), scale)
    # The spread of the values along any direction is at most their radius.
    lever = (gain * query_radius + pull) * value_radius
    parts = (gain * key_radius * value_radius, lever, np.ones_like(gain), np.hypot(1.0, lever))
    return CrossConstants(*(np.where(np.isnan(part), np.inf, SAFETY * part) for part in parts))


def additive_attention_constants(scale: npt.ArrayLike, *, value_radius: float) -> CrossConstants:
    """Theorem 7.7 for logits `sum_d scale_d tanh(x_id + y_jd)`; only values need a ball.

    Args:
        scale: shape `(D,)`.
        value_radius: radius of the ball that holds every value.

    Returns:
        `CrossConstants` of floats.
    """
    lever = SAFETY * float(np.linalg.norm(np.asarray(scale, np.float64))) * value_radius
    # The derivative of a logit in its query is half of `scale`, up to half of its size.
    return CrossConstants(0.5 * lever, lever, 1.0, 1.0 + lever)


def _schur_mass(mass: np.ndarray, tokens: int | None, n_queries: int | None) -> np.ndarray:
    """Bound of the squared norm of `P_ij |v_j - vbar_i|` for tokens in the unit ball.

    Rows sum to 1 at most, and as `p (1 - p) <= 1/4` each of the queries that see a key adds 1/2 at
    most to the sum of its column.
    """
    known = [number for number in (tokens, n_queries) if number is not None]
    return np.minimum(mass, min(known) / 2.0) if known else mass


def _query_offset(query: np.ndarray, center, bias) -> np.ndarray:
    """The query of the center of the ball, shape `(k,)` or `(H, k)`."""
    offset = np.zeros((*query.shape[:-2], query.shape[-1]))
    if center is not None:
        offset = offset + np.asarray(center, np.float64) @ query
    return offset if bias is None else offset + np.asarray(bias, np.float64)


def _logit_slopes(
    query: np.ndarray, key: np.ndarray, offset: np.ndarray, scale: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """`||scale W_k W_q^T||` and `|scale W_k offset|`, each a number or of shape `(H,)`.

    The derivative of a logit in its key, `scale W_k q_i`, is at most the first times the distance
    of the query from the center of its ball plus the second.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    gain = SAFETY * np.asarray(operator_norm(scale * key @ np.swapaxes(query, -1, -2)))
    return gain, np.linalg.norm(scale * (key @ offset[..., None])[..., 0], axis=-1)


def _head_constants(l2: np.ndarray, token: np.ndarray) -> HeadConstants:
    l2, token = (np.where(np.isnan(value), np.inf, SAFETY * value) for value in (l2, token))
    return HeadConstants(float(l2), float(token)) if l2.ndim == 0 else HeadConstants(l2, token)


def _reached(matrix: np.ndarray, axes: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """A matrix whose image of the unit ball holds every `matrix @ (v @ axes + offset)`.

    Here `|v| <= 1`, and the result has shape `(rows, k)`. With any `t > 0` the vector is
    `matrix @ [axes, offset / t]^T (v, t)`, and `|(v, t)|^2 <= 1 + t^2`.
    """
    gain = operator_norm(_triangle(matrix) @ _triangle(axes).T)
    fixed = float(np.linalg.norm(matrix @ offset))
    if fixed == 0.0:
        joint, reach = axes, 1.0
    else:
        t = math.sqrt(fixed / gain) if gain > 0.0 else 1.0
        t = min(max(t, 1e-3), 1e3)
        joint, reach = np.concatenate([axes, offset[None] / t]), math.sqrt(1.0 + t * t)
    triangle = _triangle(joint)
    square = np.zeros((matrix.shape[1], matrix.shape[1]))
    square[: len(triangle)] = reach * triangle
    return matrix @ square.T


def _triangle(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _split(b: np.ndarray, c: np.ndarray) -> float:
    """`min_s ||stack(C_h / s_h)|| ||[s_h B_h]||` for `b` `(H, D, k)` and `c` `(H, l, O)`."""
    size = max(b.shape[2], c.shape[1])
    b = np.pad(b, ((0, 0), (0, 0), (0, size - b.shape[2])))
    c = np.pad(c, ((0, 0), (0, size - c.shape[1]), (0, 0)))
    return certified_layer_bound(b, c, norm="l2", tokens=None, head_constants=np.ones(len(b))).value


def _product(units: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """`||stack(2^left_h units_h)|| |2^right|`, computed relative to the largest numbers."""
    tops = float(left.max()), float(right.max())
    weights = np.exp2(left - tops[0])[:, None, None]
    stacked = operator_norm((weights * units).reshape(-1, units.shape[-1]))
    return float(stacked * np.linalg.norm(np.exp2(right - tops[1])) * np.exp2(sum(tops)))
