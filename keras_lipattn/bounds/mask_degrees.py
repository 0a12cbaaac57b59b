"""Degrees of an attention mask."""

import numpy as np
import numpy.typing as npt


def mask_degrees(mask: npt.ArrayLike) -> tuple[int, int]:
    """How many other keys a query sees, and how many other queries see a key, at most.

    Args:
        mask: array of shape `(N, N)` or `(..., N, N)`, true where query `i` sees key `j`. The
            diagonal does not matter: a token always sees itself. With leading axes the degrees
            are the largest over them.

    Returns:
        `(n_keys, n_queries)`, two integers.

    Raises:
        ValueError: if the last two axes are not square.
    """
    mask = np.asarray(mask)
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(
            "`mask` must be square, of shape `(..., N, N)`: queries and keys of self-attention "
            f"are the same tokens. Received: shape={mask.shape}"
        )
    others = mask.astype(bool) & ~np.eye(mask.shape[-1], dtype=bool)
    if others.size == 0:
        return 0, 0
    return int(others.sum(axis=-1).max()), int(others.sum(axis=-2).max())
