"""Weights of L2 attention that approximate given weights of dot-product attention."""

import numpy as np

# Cutoff of the pseudoinverse in `matching_value`, relative to the largest eigenvalue. Smaller
# eigenvalues would need kernels of unbounded size.
_CUTOFF = 1e-3


def tied_query(query, key):
    """The kernel `W` whose distances approximate the scores of `query` and `key`.

    Up to a constant per row, which cancels in the softmax, the scores of a head are

    ```
    dot product:  x_i A x_j^T / sqrt(K),                          A = W_Q W_K^T
    L2:           (2 x_i W W^T x_j^T - |x_j W|^2) / sqrt(K)
    ```

    where tokens `x` are rows. `W W^T` is symmetric positive semidefinite. The closest such matrix
    to `A / 2` in the Frobenius norm is the positive part of `(A + A^T) / 4`. Its rank is at most
    `K`, since `x A x^T = (|x W_Q + x W_K|^2 - |x W_Q - x W_K|^2) / 4`, so a kernel with `K` columns
    attains it. The antisymmetric part and the negative eigenvalues are lost, and the term
    `|x_j W|^2` is new. It is constant if all projected tokens have the same norm.

    Args:
        query: `(H, D, K)`.
        key: `(H, D, K)`.

    Returns:
        `(H, D, K)`; with columns of zeros if the positive part has a lower rank.
    """
    tied = np.zeros_like(query)
    for head, (w_q, w_k) in enumerate(zip(query, key, strict=True)):
        # The product acts in the span of both kernels, which is usually far smaller than D.
        basis, _ = np.linalg.qr(np.concatenate([w_q, w_k], axis=1))
        product = (basis.T @ w_q) @ (basis.T @ w_k).T
        values, vectors = np.linalg.eigh((product + product.T) / 4.0)
        kept = min(query.shape[2], len(values))
        values, vectors = values[::-1][:kept], vectors[:, ::-1][:, :kept]
        tied[head, :, :kept] = basis @ (vectors * np.sqrt(np.maximum(values, 0.0)))
    return tied


def matching_value(tied, value):
    """The value kernel with which L2 attention approximates the values of `value`.

    L2 attention multiplies the mean of the tokens by `G = W W^T / sqrt(K)`, of rank at most `K`,
    before the value kernel. With the output kernel copied, `|G M - W_V W_O|` is smallest for
    `M = G^+ W_V W_O`, that is, for the value kernel `G^+ W_V`. It is exact where the columns of
    `W_V` lie in the range of `G`, and the part of `W_V` orthogonal to this range is lost.

    Args:
        tied: Result of `tied_query`, `(H, D, K)`.
        value: `(H, D, V)`.

    Returns:
        `(H, D, V)`.
    """
    factor = np.matmul(tied, np.swapaxes(tied, 1, 2)) / np.sqrt(tied.shape[2])
    return np.matmul(np.linalg.pinv(factor, rcond=_CUTOFF, hermitian=True), value)
