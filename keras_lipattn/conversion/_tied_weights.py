"""Weights of L2 attention which come close to given ones of dot-product attention."""

import numpy as np

# Directions in which a head separates tokens by less than this part of its largest squared
# separation carry no values: undoing the factor there takes kernels of unbounded size.
_CUTOFF = 1e-3


def tied_query(query, key):
    """The kernel `W` whose distances imitate the logits of `query` and `key`.

    Up to a constant per row, which the softmax does not see, the logits of a head are

    ```
    dot product:  x_i A x_j^T / sqrt(K),                          A = W_Q W_K^T
    L2:           (2 x_i W W^T x_j^T - |x_j W|^2) / sqrt(K)
    ```

    with `x` as rows. `W W^T` is symmetric and has no negative eigenvalue, and the one closest to
    `A / 2` in the Frobenius norm is the positive part of `(A + A^T) / 4`. Its rank is at most `K`,
    since `x A x^T = (|x W_Q + x W_K|^2 - |x W_Q - x W_K|^2) / 4`, hence a kernel of `K` columns
    attains it. The antisymmetric part and the negative eigenvalues have no counterpart, and the
    term `|x_j W|^2` is what is added; it is a constant where the projected tokens have one norm.

    Args:
        query: `(H, D, K)`.
        key: `(H, D, K)`.

    Returns:
        `(H, D, K)`; columns are zero where the positive part has a lower rank.
    """
    tied = np.zeros_like(query)
    for head, (w_q, w_k) in enumerate(zip(query, key, strict=True)):
        # The product lives in the span of both kernels, mostly far smaller than D.
        basis, _ = np.linalg.qr(np.concatenate([w_q, w_k], axis=1))
        product = (basis.T @ w_q) @ (basis.T @ w_k).T
        values, vectors = np.linalg.eigh((product + product.T) / 4.0)
        kept = min(query.shape[2], len(values))
        values, vectors = values[::-1][:kept], vectors[:, ::-1][:, :kept]
        tied[head, :, :kept] = basis @ (vectors * np.sqrt(np.maximum(values, 0.0)))
    return tied


def matching_value(tied, value):
    """The value kernel with which L2 attention mixes what `value` did.

    Between attention and values stands `G = W W^T / sqrt(K)`, of rank `K` at most. With the output
    kernel as it was, `|G M - W_V W_O|` is least for `M = G^+ W_V W_O`, so for the value kernel
    `G^+ W_V`: exact for values that read what the head compares tokens by, and without those that
    read anything else.

    Args:
        tied: What `tied_query` gave, `(H, D, K)`.
        value: `(H, D, V)`.

    Returns:
        `(H, D, V)`.
    """
    factor = np.matmul(tied, np.swapaxes(tied, 1, 2)) / np.sqrt(tied.shape[2])
    return np.matmul(np.linalg.pinv(factor, rcond=_CUTOFF, hermitian=True), value)
