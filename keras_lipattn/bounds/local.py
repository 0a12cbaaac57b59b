"""Theorem 6 of docs/theory.md: the constant near a given input, in the 2-norm or token norm.

Theorem 6 bounds the norm of each block `(i, j)` of the Jacobian on a ball. The norm of the matrix
of these bounds is a bound in the 2-norm; its largest row sum is a bound in the token norm.
"""

import math

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.key_weights import weighted_constants, weights_of_pairs
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import certified_layer_bound
from keras_lipattn.bounds.unit_head import unit_head_bound
from keras_lipattn.bounds.unit_head_lemmas import s_star
from keras_lipattn.linalg import SAFETY, operator_norm

# Relative amount by which distances are rounded, in the direction that keeps the bound valid.
DISTANCE_ROUNDING = 1e-12
# Entries of the largest intermediate array `(rows, N, d)`.
BLOCK_ENTRIES = 1 << 22


def local_head_bound(
    y: npt.ArrayLike,
    radius: float,
    *,
    mask: npt.ArrayLike | None = None,
    norm: str = "l2",
    covariance: str = "eigenvalue",
    cap: float | None = None,
) -> float:
    """Theorem 6: constant of the unit head on a ball around its input `y`.

    Args:
        y: shape `(N, d)`, the head's tokens `X B_h`, without padded tokens.
        radius: radius of the ball in the 2-norm of all entries, `>= 0`; 0 gives a bound of the
            Jacobian's norm at `y`.
        mask: shape `(N, N)`, true where query `i` sees key `j`, or the weight of key `j` for it.
            The diagonal must be true, or 1. By default every query sees every key.
        norm: `"l2"` or `"token"`, of inputs and outputs; the ball is one of the 2-norm for both.
        covariance: `"eigenvalue"` is tighter, `"trace"` avoids `N` eigenvalue problems.
        cap: a constant for all inputs; the result is never larger. By default it is the global
            constant for the mask or the weights.

    Returns:
        A float, `inf` when `y` is not finite.

    Raises:
        ValueError: if shapes do not fit, the radius or a weight is negative, or a token may not
            attend to itself with weight 1.
    """
    y = np.asarray(y, np.float64)
    if y.ndim != 2 or 0 in y.shape:
        raise ValueError(f"`y` must have shape `(N, d)`. Received: shape={y.shape}")
    if not radius >= 0.0:
        raise ValueError(f"`radius` must not be negative. Received: radius={radius}")
    if norm not in ("l2", "token"):
        raise ValueError(f'`norm` must be "l2" or "token". Received: norm={norm!r}')
    if covariance not in ("eigenvalue", "trace"):
        raise ValueError(
            f'`covariance` must be "eigenvalue" or "trace". Received: covariance={covariance!r}'
        )
    tokens = len(y)
    mask = np.ones((tokens, tokens), bool) if mask is None else np.asarray(mask)
    if mask.shape != (tokens, tokens):
        raise ValueError(
            f"`mask` must have shape ({tokens}, {tokens}). Received: shape={mask.shape}"
        )
    weights = mask.astype(np.float64)
    if not (weights.diagonal() == 1.0).all():
        raise ValueError(
            "Every token must attend to itself, with weight 1, or no finite bound exists. "
            f"Received: mask.diagonal()={mask.diagonal()}"
        )
    if not ((weights >= 0.0) & (weights < np.inf)).all():
        raise ValueError(
            "Weights of keys must be finite and not negative. "
            f"Received: from {weights.min()} to {weights.max()}"
        )
    if not np.isfinite(y).all():
        return math.inf
    if cap is None:
        cap = _global_constant(weights, norm)
    norms = np.empty((tokens, tokens))
    step = max(1, BLOCK_ENTRIES // y.size)
    for start in range(0, tokens, step):
        rows = np.arange(start, min(start + step, tokens))
        norms[rows] = _block_norms(y, rows, radius, weights[rows], covariance)
    if norm == "token":
        return min(SAFETY * float(norms.sum(axis=1).max()), cap)
    return min(nonnegative_norm(norms), cap)


def local_layer_bound(
    x: npt.ArrayLike,
    radius: float,
    b: npt.ArrayLike,
    c: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | None = None,
    norm: str = "l2",
    covariance: str = "eigenvalue",
    product_scale: npt.ArrayLike | None = None,
    query_error: npt.ArrayLike = 0.0,
    product_error: npt.ArrayLike = 0.0,
    published: float = math.inf,
) -> LipschitzBound:
    """Theorem 6 with Theorems 5.1 and 5.2: constant of a layer on a ball around its input `x`.

    Args:
        x: shape `(N, D)`, without padded tokens.
        radius: radius of the ball in the 2-norm of all entries.
        b: shape `(H, D, k)`, see `certified_layer_bound`.
        c: shape `(H, k, O)`.
        mask: shape `(N, N)` or `(H, N, N)`, see `local_head_bound`.
        norm: `"l2"` or `"token"`, of inputs and outputs; the ball is one of the 2-norm for both.
        covariance: see `local_head_bound`.
        product_scale: see `certified_layer_bound`.
        query_error: scalar or shape `(H,)`. The bound also holds for kernels that differ from the
            `B_h` by at most this in Frobenius norm.
        product_error: the same for the `C_h`.
        published: the published bound, kept in the result.

    Returns:
        A `LipschitzBound`.

    Raises:
        ValueError: see `local_head_bound`.
    """
    b, tokens = np.asarray(b, np.float64), np.asarray(x, np.float64)
    # A common shift of the tokens does not change the heads.
    tokens = tokens - tokens.mean(axis=0)
    size = len(tokens)
    errors = np.broadcast_to(np.asarray(query_error, np.float64), (len(b),))
    masks = [None] * len(b) if mask is None else np.broadcast_to(mask, (len(b), size, size))
    constants = [
        local_head_bound(
            tokens @ head,
            # Errors of the kernels also move the center of the ball.
            radius * (stretch + error) + float(np.linalg.norm(tokens)) * error,
            mask=visible,
            norm=norm,
            covariance=covariance,
        )
        # NaN kernels are reported by `certified_layer_bound`.
        if math.isfinite(stretch) and np.isfinite(tokens).all()
        else math.nan
        for head, stretch, error, visible in zip(
            b, SAFETY * operator_norm(b), errors, masks, strict=True
        )
    ]
    return certified_layer_bound(
        b,
        c,
        norm=norm,
        tokens=size,
        head_constants=constants,
        head_theorem="Theorem 6",
        product_scale=product_scale,
        query_error=query_error,
        product_error=product_error,
        published=published,
    )


def nonnegative_norm(matrix: np.ndarray, *, num_iters: int = 40) -> float:
    """Upper bound of the operator norm of an entrywise nonnegative matrix.

    By Collatz and Wielandt `||b||^2 <= max_i (b^T b z)_i / z_i` for every positive `z`.

    Args:
        matrix: shape `(rows, columns)`, no column of zeros.
        num_iters: number of steps `z <- b^T b z`; the bound holds at every step.

    Returns:
        A float.
    """
    z = np.ones(matrix.shape[1])
    best = math.inf
    for _ in range(num_iters):
        image = matrix.T @ (matrix @ z)
        best = min(best, float((image / z).max()))
        z = np.maximum(image / image.max(), 1e-12)
    return SAFETY * math.sqrt(best)


def _global_constant(weights: np.ndarray, norm: str) -> float:
    tokens = len(weights)
    visible = weights > 0.0
    if (weights != visible).any():
        return float(weighted_constants(weights_of_pairs(weights), norm).max())
    if visible.all():
        return unit_head_bound(tokens, "full", norm).value
    if (visible == np.tri(tokens, dtype=bool)).all():
        return unit_head_bound(tokens, "causal", norm).value
    keys = int(visible.sum(axis=1).max()) - 1
    queries = int(visible.sum(axis=0).max()) - 1
    return unit_head_bound(tokens, "any", norm, n_keys=keys, n_queries=queries).value


def _block_norms(
    y: np.ndarray, rows: np.ndarray, radius: float, weights: np.ndarray, covariance: str
) -> np.ndarray:
    """Upper bounds of the norms of the Jacobian's blocks `(i, j)`, shape `(rows, N)`."""
    index = np.arange(len(rows)), rows
    others = weights.copy()
    others[index] = 0.0
    # Differences, never a Gram expansion, which cancels for tokens far from the origin.
    edges = y[None] - y[rows][:, None]
    distance = np.sqrt(np.square(edges).sum(axis=-1))
    travel = math.sqrt(2.0) * radius
    near = np.maximum(distance * (1.0 - DISTANCE_ROUNDING) - travel, 0.0)
    far = distance * (1.0 + DISTANCE_ROUNDING) + travel
    kernel, upper, lower = (others * np.exp(-np.square(d)) for d in (distance, near, far))
    kernel_sum, upper_sum, lower_sum = (
        k.sum(axis=1, keepdims=True) for k in (kernel, upper, lower)
    )
    prob = kernel / (1.0 + kernel_sum)
    prob_up = upper / (1.0 + upper + lower_sum - lower)
    prob_down = lower / (1.0 + lower + upper_sum - upper)
    for probability, mass in ((prob, kernel_sum), (prob_up, lower_sum), (prob_down, upper_sum)):
        probability[index] = 1.0 / (1.0 + mass[:, 0])

    mean = np.einsum("ij,ijd->id", prob, edges)
    centered = edges - mean[:, None]
    reach = np.sqrt(np.square(centered).sum(axis=-1)) * (1.0 + DISTANCE_ROUNDING)
    spread = radius * np.sqrt(prob_up.max(axis=1))
    change = np.maximum(prob_up - prob, prob - prob_down)
    mean_change = (change * reach).sum(axis=1) + spread

    if covariance == "eigenvalue":
        weighted = centered * np.sqrt(prob_up)[..., None]
        moments = np.matmul(weighted.transpose(0, 2, 1), weighted)
        largest = np.maximum(np.linalg.eigvalsh(moments)[:, -1], 0.0)
    else:
        largest = (prob_up * np.square(reach)).sum(axis=1)
    largest = np.square(np.sqrt(largest) + spread)

    shift = radius + mean_change[:, None]
    square = np.square((reach + shift) * far)
    inner = np.einsum("ijd,ijd->ij", centered, edges)
    turn = 1.0 - 2.0 * (inner - reach * travel - distance * shift - travel * shift)
    root = np.sqrt(np.maximum(np.square(square) + square * turn, 0.0))
    norms = prob_up * np.sqrt(np.maximum(turn + 2.0 * square + 2.0 * root, 1.0))
    norms = np.where(others > 0.0, norms, 0.0)
    everywhere = np.array([1.0 + 2.0 * s_star(n) for n in others.sum(axis=1)])
    norms[index] = np.minimum(prob_up[index] + 2.0 * largest, everywhere)
    return norms
