"""Section 5 of docs/theory.md: from folded kernels to the Lipschitz constant of a layer.

A layer is `X -> sum_h g(X B_h) C_h + constant` with the unit head `g`. `layer_matrices` names the
matrices whose operator norms the bound needs. The formulas take a dictionary of these norms and the
array namespace `xp` (`numpy` on the host, `keras.ops` in a graph), so that a running estimate and a
certified number come from the same lines.

Shapes: `b` is `(H, D, k)`, the query kernels divided by `key_dim**0.25`; `c` is `(H, k, O)`,
the folded `C_h = B_h^T W_V^h W_O^h`; a scaling is `(H,)`, positive.
"""

import math
import typing

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.head_scaling import (
    balancing_powers,
    frobenius_scaling,
    polished_scaling,
    scaled_back,
    scaling_and_norms,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.unit_head import UnitBound, unit_head_bound
from keras_lipattn.bounds.unit_head_lemmas import phi_inv
from keras_lipattn.bounds.visible_pairs import Cliques
from keras_lipattn.linalg import SAFETY, cached_by_content, fast_operator_norm
from keras_lipattn.linalg.power import ScaledMatrix
from keras_lipattn.linalg.precision import SMALLEST_NORMAL

# Operator norms by name, in arrays of the namespace.
Norms = typing.Mapping[str, typing.Any]

# Relative error of a float64 product `B^T W_V W_O`, per unit of the product of the norms.
PRODUCT_ROUNDING = 1e-14

COMPOSITION = {"l2": "Theorem 5.1", "token": "Theorem 5.2"}


def layer_matrices(
    b: typing.Any, c: typing.Any, norm: str, xp: typing.Any, scale: typing.Any = None
) -> dict[str, typing.Any]:
    """The matrices whose operator norms the bound of a layer needs.

    - `"stacked_output"`: `stack(C_h / s_h)`, shape `(H*k, O)`, a `ScaledMatrix`;
    - `"concatenated_query"`: `[s_h B_h]`, shape `(D, H*k)`, a `ScaledMatrix`;
    - `"head_query"`: all `B_h`, shape `(H, D, k)`, a batch of `H` matrices.

    Args:
        b: shape `(H, D, k)`.
        c: shape `(H, k, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        xp: array namespace, `numpy` or `keras.ops`.
        scale: scaling of the heads, shape `(H,)`; `frobenius_scaling` by default.

    Returns:
        Dictionary of those that the bound in `norm` needs.
    """
    if norm == "linf":
        return {"head_query": b}
    # Frobenius norms, which only power steps need.
    of_heads = of_query = of_output = None
    if scale is None:
        scale, of_heads, of_outputs = scaling_and_norms(b, c, xp)
        of_query = _root_of_squares(scale * of_heads, xp)
        of_output = _root_of_squares(of_outputs / scale, xp)
    heads, features, key_dim = b.shape
    stacked = ScaledMatrix(
        xp.reshape(c, (heads * key_dim, c.shape[2])),
        rows=_per_feature(1.0 / scale, key_dim, xp),
        frobenius=of_output,
    )
    if norm == "token":
        # The norm of `[s_h B_h]` would be smaller and wrong.
        return {"stacked_output": stacked, "head_query": ScaledMatrix(b, frobenius=of_heads)}
    concatenated = ScaledMatrix(
        xp.reshape(xp.transpose(b, (1, 0, 2)), (features, heads * key_dim)),
        columns=_per_feature(scale, key_dim, xp),
        frobenius=of_query,
    )
    return {"concatenated_query": concatenated, "stacked_output": stacked}


def exact_norms(matrices: typing.Mapping[str, typing.Any]) -> Norms:
    """Operator norms of the matrices of `layer_matrices` on the host, at most 1e-9 above."""
    return {
        name: fast_operator_norm(matrix.formed(np) if isinstance(matrix, ScaledMatrix) else matrix)
        for name, matrix in matrices.items()
    }


def split_bound(
    norm: str,
    scale: typing.Any,
    norms: Norms,
    xp: typing.Any,
    *,
    query_error: typing.Any = None,
    product_error: typing.Any = None,
) -> typing.Any:
    """Theorems 5.1 and 5.2 without the unit head's constant.

    `||stack(C_h / s_h)|| ||[s_h B_h]||` for `"l2"`, and for `"token"`
    `||stack(C_h / s_h)|| sqrt(sum_h s_h^2 ||B_h||^2)`.

    Args:
        norm: `"l2"` or `"token"`.
        scale: shape `(H,)`, positive.
        norms: those of `layer_matrices`, with the same scaling.
        xp: array namespace.
        query_error: shape `(H,)`, upper bounds of the Frobenius norms of errors of the `B_h`.
        product_error: the same for the `C_h`.

    Returns:
        A scalar of the namespace.
    """
    output = norms["stacked_output"]
    if product_error is not None:
        output = output + xp.sqrt(xp.sum(xp.square(product_error / scale)))
    if norm == "l2":
        query = norms["concatenated_query"]
        if query_error is not None:
            query = query + xp.sqrt(xp.sum(xp.square(query_error * scale)))
        return output * query
    heads = norms["head_query"]
    if query_error is not None:
        heads = heads + query_error
    return output * safe_sqrt(xp.sum(xp.square(scale * heads)), xp)


def bound_linf(
    b: typing.Any,
    c: typing.Any,
    row_constant: typing.Any,
    score_constant: typing.Any,
    norms: Norms,
    xp: typing.Any,
    *,
    query_error: typing.Any = None,
    product_error: typing.Any = None,
) -> typing.Any:
    """Theorem 5.3: bound of the layer in the largest absolute entry.

    Args:
        b: shape `(H, D, k)`.
        c: shape `(H, k, O)`.
        row_constant: `V` of Theorem 4, a float or shape `(H, 1)`.
        score_constant: `4 Phi`, a float or shape `(H, 1)`.
        norms: those of `layer_matrices` for `"linf"`.
        xp: array namespace.
        query_error: shape `(H,)`, upper bounds of the Frobenius norms of errors of the `B_h`.
        product_error: the same for the `C_h`.

    Returns:
        A scalar of the namespace.
    """
    columns = safe_sqrt(xp.sum(xp.square(c), axis=1), xp)
    values = xp.sum(xp.abs(xp.matmul(b, c)), axis=1)
    spread = xp.expand_dims(norm_2_to_1(b, norms["head_query"], xp), 1)
    if product_error is not None:
        error = xp.expand_dims(product_error, 1)
        columns = columns + error
        values = values + spread * error
    if query_error is not None:
        # |E e|_1 <= sqrt(D) |E|_F for a unit vector e.
        error = math.sqrt(b.shape[1]) * xp.expand_dims(query_error, 1)
        values = values + columns * error
        spread = spread + error
    columns = columns * spread
    heads = xp.minimum(row_constant * columns, values + score_constant * columns)
    return xp.max(xp.sum(heads, axis=0))


def norm_2_to_1(b: typing.Any, spectral: typing.Any, xp: typing.Any) -> typing.Any:
    """Upper bound of `max_{|e| = 1} ||B_h e||_1` for every head.

    It is the largest `|B_h^T sign|` over vectors of signs, bounded in three ways.

    Args:
        b: shape `(H, D, k)`.
        spectral: their operator norms, shape `(H,)`.
        xp: array namespace.

    Returns:
        Shape `(H,)`.
    """
    gram = xp.sum(xp.abs(xp.matmul(b, xp.transpose(b, (0, 2, 1)))), axis=(1, 2))
    column_sums = xp.sum(xp.square(xp.sum(xp.abs(b), axis=1)), axis=1)
    spectral = math.sqrt(b.shape[1]) * spectral
    return xp.minimum(safe_sqrt(xp.minimum(gram, column_sums), xp), spectral)


def running_layer_bound(
    b: typing.Any,
    c: typing.Any,
    *,
    norm: str,
    unit: UnitBound,
    norms: Norms,
    xp: typing.Any,
) -> typing.Any:
    """Theorems 5.1 to 5.3 with one scaling of the heads, for use in a graph.

    With exact norms it is a valid upper bound, never below `certified_layer_bound`. With running
    norms there is no guarantee.

    Args:
        b: shape `(H, D, k)`.
        c: shape `(H, k, O)`.
        norm: `"l2"`, `"token"` or `"linf"`.
        unit: the `UnitBound` of the same norm, of floats or of scalars of the namespace.
        norms: operator norms of `layer_matrices`.
        xp: array namespace.

    Returns:
        A scalar of the namespace.

    Raises:
        ValueError: if `unit` is infinite.
    """
    if isinstance(unit.value, float) and math.isinf(unit.value):
        raise ValueError(
            f"A graph needs a finite constant of the unit head: {unit.reason}. "
            f"Received: unit={unit}"
        )
    if norm == "linf":
        return bound_linf(b, c, unit.value, unit.score_part, norms, xp)
    scale = frobenius_scaling(b, c, xp) if norm == "token" else None
    return unit.value * split_bound(norm, scale, norms, xp)


def certified_layer_bound(
    b: npt.ArrayLike,
    c: npt.ArrayLike,
    *,
    norm: str,
    tokens: int | None,
    mask: str = "full",
    n_keys: int | None = None,
    n_queries: int | None = None,
    cliques: Cliques | None = None,
    head_constants: npt.ArrayLike | None = None,
    head_scores: npt.ArrayLike | None = None,
    head_theorem: str = "",
    product_scale: npt.ArrayLike | None = None,
    query_error: npt.ArrayLike | None = None,
    product_error: npt.ArrayLike | None = None,
    published: float = math.inf,
) -> LipschitzBound:
    """Certified Lipschitz bound of a layer of L2 attention heads: Theorems 5.1, 5.2 and 5.3.

    Valid at inference, for a fixed mask that keeps the diagonal and at most `tokens` tokens.

    Args:
        b: shape `(H, D, k)`, the query kernels divided by `key_dim**0.25`, any real dtype.
        c: shape `(H, k, O)`, the folded `C_h = B_h^T W_V^h W_O^h`.
        norm: `"l2"`, `"token"` or `"linf"`.
        tokens: largest number of tokens, or `None` when unknown.
        mask: `"full"` (padding included), `"causal"` or `"any"`.
        n_keys: for `mask="any"`, the largest number of other keys a query sees.
        n_queries: for `mask="any"`, the largest number of other queries that see a key.
        cliques: for `mask="any"`, the cliques of the mask if they are known.
        head_constants: shape `(H,)`, constants of the heads that replace the one of the unit head
            (from Theorem 6, for instance).
        head_scores: for `norm="linf"` with `head_constants`, shape `(H,)`: the constants `4 Phi`.
        head_theorem: the theorem behind `head_constants`.
        product_scale: scalar or shape `(H,)`, `||B_h|| ||W_V^h|| ||W_O^h||`. When given, an
            allowance for the rounding of the product `C_h` is added: it matters when the
            product cancels.
        query_error: scalar or shape `(H,)`. When given, the bound also holds for kernels that
            differ from the `B_h` by at most this in Frobenius norm.
        product_error: the same for the `C_h`.
        published: the published bound, kept in the result.

    Returns:
        A `LipschitzBound`; `inf` with a reason when the kernels are not finite or no finite
        constant exists.

    Raises:
        ValueError: if shapes do not fit or an argument is out of range.
    """
    b, c = np.asarray(b, np.float64), np.asarray(c, np.float64)
    _check_shapes(b, c)
    ones = np.ones(len(b))
    if head_constants is None:
        structure = dict(n_keys=n_keys, n_queries=n_queries, cliques=cliques)
        unit = unit_head_bound(tokens, mask, norm, **structure)
        heads, scores = ones, unit.score_part * ones
    else:
        if norm == "linf" and head_scores is None:
            raise ValueError(
                '`head_constants` need `head_scores` for `norm="linf"`. Received: head_scores=None'
            )
        unit = UnitBound(1.0, head_theorem)
        heads = np.asarray(head_constants, np.float64)
        scores = ones if head_scores is None else np.asarray(head_scores, np.float64)
    error, query = np.zeros(len(b)), np.zeros(len(b))
    if product_scale is not None:
        error += PRODUCT_ROUNDING * np.asarray(product_scale, np.float64)
    if product_error is not None:
        error += np.asarray(product_error, np.float64)
    if query_error is not None:
        query += np.asarray(query_error, np.float64)
    reason = ""
    if not all(np.isfinite(array).all() for array in (b, c, error, query)):
        reason = "the kernels hold NaN or infinite entries"
    elif math.isinf(unit.value):
        reason = unit.reason
    elif not (np.isfinite(heads).all() and np.isfinite(scores).all()):
        reason = "a head has no finite constant"
    value, theorem = math.inf, ""
    if not reason:
        rows = (unit.value * heads)[:, None]
        if norm != "linf":
            b, query = b * heads.reshape(-1, 1, 1), query * heads
        b, query, c, error = _balanced(b, query, c, error)
        # Kernels of size 1: squares neither overflow nor vanish. The bound is linear in each.
        size_b = max(float(np.abs(b).max()), float(query.max()), SMALLEST_NORMAL)
        size_c = max(float(np.abs(c).max()), float(error.max()), SMALLEST_NORMAL)
        b, query, c, error = b / size_b, query / size_b, c / size_c, error / size_c
        if norm == "linf":
            unscaled = cached_by_content(_linf, b, c, rows, scores[:, None], query, error)
            theorem = unit.theorem
        else:
            unscaled = unit.value * cached_by_content(_best_split, norm, b, c, query, error)
            theorem = f"{COMPOSITION[norm]} with {unit.theorem}"
        value, reason = scaled_back(unscaled, size_b, size_c)
    return LipschitzBound(
        value=value,
        norm=norm,
        kind="certified",
        theorem="" if reason else theorem,
        reason=reason,
        published=published,
    )


def published_layer_bound(
    query_kernel: npt.ArrayLike,
    value_kernel: npt.ArrayLike,
    output_kernel: npt.ArrayLike,
    *,
    norm: str,
    tokens: int,
) -> float:
    """The bound of a layer by Kim, Papamakarios and Mnih, for comparison.

    The exponent of the query kernel's norm in the 2-norm bound is 4 here. Section 2 of
    docs/theory.md has a counterexample to the published exponent 2.

    Args:
        query_kernel: shape `(H, D, k)`, tied query and key kernel of each head.
        value_kernel: shape `(H, D, v)`.
        output_kernel: shape `(H, v, O)`.
        norm: `"l2"` or `"linf"`. There is no published bound for `"token"`: `inf`.
        tokens: number of tokens `N >= 1`.

    Returns:
        A float; `inf` when a kernel holds a NaN or infinite entry.

    Reference: "The Lipschitz constant of self-attention", ICML 2021, Theorem 3.2.
    """
    query, value, output = (
        np.asarray(kernel, np.float64) for kernel in (query_kernel, value_kernel, output_kernel)
    )
    if not all(np.isfinite(kernel).all() for kernel in (query, value, output)):
        return math.inf
    key_dim = query.shape[-1]
    stacked = output.reshape(-1, output.shape[-1])
    four_phi = 4.0 * phi_inv(tokens - 1)
    # A bound larger than the largest float64 is `inf`.
    with np.errstate(over="ignore"):
        if norm == "l2":
            heads = fast_operator_norm(query) ** 2 * fast_operator_norm(value)
            head = math.sqrt(tokens / key_dim) * (four_phi + 1.0)
            return float(SAFETY * head * math.hypot(*heads) * fast_operator_norm(stacked))
        if norm == "linf":
            rows = np.abs(query).sum(axis=2).max(axis=1)
            columns = np.abs(query).sum(axis=1).max(axis=1)
            values = np.abs(value).sum(axis=1).max()
            outputs = np.abs(stacked).sum(axis=0).max()
            head = four_phi + 1.0 / math.sqrt(key_dim)
            return float(SAFETY * head * outputs * (rows * columns).max() * values)
    return math.inf


def safe_sqrt(x: typing.Any, xp: typing.Any) -> typing.Any:
    """Square root with a finite gradient at 0."""
    # The inner `where` keeps the infinite slope out of the gradient.
    positive = x > 0.0
    return xp.where(positive, xp.sqrt(xp.where(positive, x, 1.0)), 0.0)


def _balanced(
    b: np.ndarray, query: np.ndarray, c: np.ndarray, error: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same heads with kernels of equal size in each head, errors included."""
    powers = balancing_powers(
        np.maximum(np.abs(b).max(axis=(1, 2)), query), np.maximum(np.abs(c).max(axis=(1, 2)), error)
    )
    wide = powers[:, None, None]
    return np.ldexp(b, wide), np.ldexp(query, powers), np.ldexp(c, -wide), np.ldexp(error, -powers)


def _best_split(
    norm: str, b: np.ndarray, c: np.ndarray, query: np.ndarray, error: np.ndarray
) -> float:
    """Smallest split bound found over the scalings of the heads, with exact norms."""

    def value(scale: np.ndarray) -> float:
        norms = exact_norms(layer_matrices(b, c, norm, np, scale))
        return float(split_bound(norm, scale, norms, np, query_error=query, product_error=error))

    start = frobenius_scaling(b, c, np)
    if len(b) == 1:
        return value(start)
    polished, estimate = polished_scaling(norm, b, c, start)
    best = value(polished)
    return best if best <= estimate else min(best, value(start))


def _linf(
    b: np.ndarray,
    c: np.ndarray,
    row_constant: np.ndarray,
    score_constant: np.ndarray,
    query: np.ndarray,
    error: np.ndarray,
) -> float:
    errors = dict(query_error=query, product_error=error)
    norms = exact_norms(layer_matrices(b, c, "linf", np))
    return float(bound_linf(b, c, row_constant, score_constant, norms, np, **errors))


def _root_of_squares(sizes, xp):
    """`sqrt(sum_h size_h^2)`, by a product: XLA compiles it faster than a reduction."""
    squares = xp.matmul(xp.expand_dims(sizes, 0), xp.expand_dims(sizes, 1))
    return xp.sqrt(xp.reshape(squares, ()))


def _per_feature(scale, key_dim, xp):
    """Repeats a number of each head for every row or column of its block, `(H * key_dim,)`."""
    heads = scale.shape[0]
    return xp.reshape(xp.broadcast_to(xp.expand_dims(scale, 1), (heads, key_dim)), (-1,))


def _check_shapes(b: np.ndarray, c: np.ndarray) -> None:
    if b.ndim != 3 or c.ndim != 3 or b.shape[0] != c.shape[0] or b.shape[2] != c.shape[1]:
        raise ValueError(
            "`b` must have shape `(H, D, k)` and `c` shape `(H, k, O)`. "
            f"Received: b.shape={b.shape}, c.shape={c.shape}"
        )
    if 0 in b.shape or 0 in c.shape:
        raise ValueError(
            f"`b` and `c` must not have empty axes. Received: b.shape={b.shape}, c.shape={c.shape}"
        )
