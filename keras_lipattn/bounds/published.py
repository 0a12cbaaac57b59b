"""The bounds of Kim, Papamakarios and Mnih, kept beside ours in every certificate.

Reference: "The Lipschitz constant of self-attention", ICML 2021, Theorem 3.2. The exponent
of the query kernel's norm in the 2-norm bound is 4 here (section 2 of docs/theory.md has a
counterexample to 2).
"""

import math

import numpy as np
import numpy.typing as npt

from keras_lipattn.bounds.scalars import phi_inv
from keras_lipattn.linalg import SAFETY, fast_operator_norm


def published_head_bound(tokens: int) -> float:
    """Published 2-norm constant of the unit head, `sqrt(N) (4 Phi + 1)`.

    Args:
        tokens: number of tokens `N >= 1`.

    Returns:
        A float. Valid for every mask that keeps the diagonal.
    """
    return math.sqrt(tokens) * (4.0 * phi_inv(tokens - 1) + 1.0)


def published_layer_bound(
    query_kernel: npt.ArrayLike,
    value_kernel: npt.ArrayLike,
    output_kernel: npt.ArrayLike,
    *,
    norm: str,
    tokens: int,
) -> float:
    """Published bound of a whole layer, from its kernels.

    Args:
        query_kernel: shape `(H, D, k)`, tied query and key kernel of each head.
        value_kernel: shape `(H, D, v)`.
        output_kernel: shape `(H, v, O)`.
        norm: `"l2"` or `"linf"`. There is no published bound for `"token"`: `inf`.
        tokens: number of tokens `N >= 1`.

    Returns:
        A float; `inf` when a kernel holds a NaN or infinite entry.
    """
    query, value, output = (
        np.asarray(kernel, np.float64) for kernel in (query_kernel, value_kernel, output_kernel)
    )
    if not all(np.isfinite(kernel).all() for kernel in (query, value, output)):
        return math.inf
    key_dim = query.shape[-1]
    stacked = output.reshape(-1, output.shape[-1])
    four_phi = 4.0 * phi_inv(tokens - 1)
    if norm == "l2":
        # A published bound that is no float is `inf`.
        with np.errstate(over="ignore"):
            heads = fast_operator_norm(query) ** 2 * fast_operator_norm(value)
            head = math.sqrt(tokens / key_dim) * (four_phi + 1.0)
            return float(SAFETY * head * math.hypot(*heads) * fast_operator_norm(stacked))
    if norm == "linf":
        rows = np.abs(query).sum(axis=2).max(axis=1)
        columns = np.abs(query).sum(axis=1).max(axis=1)
        values = np.abs(value).sum(axis=1).max()
        outputs = np.abs(stacked).sum(axis=0).max()
        head = four_phi + 1.0 / math.sqrt(key_dim)
        with np.errstate(over="ignore"):
            return float(SAFETY * head * outputs * (rows * columns).max() * values)
    return math.inf
