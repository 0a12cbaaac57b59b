"""Theorem 7.4 of docs/theory.md: a layer of dot-product attention whose tokens fill an ellipsoid.

The image of a ball under a linear map is an ellipsoid: that is what a normalisation with its
scales, or a linear map after it, leaves. Theorem 7.1 sees the smallest ball around it and one head
at a time.
"""

import math

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.compact import column_mass, combine_heads
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.linalg import SAFETY, operator_norm


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
    n_queries: int | None = None,
) -> float:
    """Constant of `X -> sum_h softmax(scale q_i . k_j) X W_V W_O` for tokens in an ellipsoid.

    Tokens are `center + v @ axes` with `|v| <= 1`. Biases of key, value and output play no role.

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
        n_queries: see `column_mass`.

    Returns:
        A float; `inf` where the numbers overflow or are not finite, or the length is not known
        and matters.
    """
    query, key, value, output, axes = (
        np.asarray(matrix, np.float64) for matrix in (query, key, value, output, axes)
    )
    heads, width, key_dim = query.shape
    scale = 1.0 / math.sqrt(key_dim) if scale is None else scale
    center = np.zeros(width) if center is None else np.asarray(center, np.float64)
    bias = np.zeros((heads, key_dim)) if query_bias is None else np.asarray(query_bias, np.float64)
    finite = (query, key, value, output, axes, center, bias)
    if not all(np.isfinite(array).all() for array in finite):
        return math.inf
    query, bias = query * scale, bias * scale
    offset = center @ query + bias
    # As the unit ball sees them.
    inner_query, inner_key, inner_value = axes @ query, axes @ key, axes @ value
    # Where the derivative of the logits in a key can be, `key @ q_i`, as the image of a unit ball.
    pulls = np.stack([_reached(*parts) for parts in zip(key, inner_query, offset, strict=True)])
    slopes = SAFETY * operator_norm(pulls)
    # A matrix with orthonormal rows in front changes no norm, so triangular factors will do.
    triangles = np.linalg.qr(inner_key, mode="r")
    mixed = np.linalg.qr(inner_value, mode="r") @ output
    queries = _split(query @ np.swapaxes(triangles, 1, 2), mixed)
    mass = np.ones(heads)
    if norm == "l2":
        spreads = [_reached(*parts) for parts in zip(inner_key, inner_query, offset, strict=True)]
        spreads = 2.0 * SAFETY * operator_norm(np.stack(spreads))
        mass = np.array([column_mass(s, tokens, mask, n_queries=n_queries) for s in spreads])
    if not np.isfinite(mass).all():
        return math.inf
    if norm == "l2" and heads > 1:
        # Apart: the kernels of all heads side by side have one norm.
        averages = np.linalg.qr(value, mode="r") @ output
        others = combine_heads(averages, np.sqrt(mass))
        others += _split(np.sqrt(mass)[:, None, None] * pulls, mixed)
    else:
        both = np.concatenate([value, slopes[:, None, None] * inner_value], axis=1)
        others = combine_heads(np.linalg.qr(both, mode="r") @ output, np.sqrt(mass))
    total = SAFETY * (queries + others)
    return math.inf if math.isnan(total) else float(total)


def _reached(matrix: np.ndarray, axes: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """`E` of shape `(rows, k)` such that every `matrix @ (v @ axes + offset)`, `|v| <= 1`, is some
    `E u` with `|u| <= 1`.

    With any `t > 0` the vector is `matrix @ [axes, offset / t]^T (v, t)`, and
    `|(v, t)|^2 <= 1 + t^2`.
    """
    ours, theirs = _triangle(matrix), _triangle(axes)
    moved = operator_norm(ours @ theirs.T)
    fixed = float(np.linalg.norm(matrix @ offset))
    if fixed == 0.0:
        joint, reach = axes, 1.0
    else:
        t = math.sqrt(fixed / moved) if moved > 0.0 else 1.0
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
