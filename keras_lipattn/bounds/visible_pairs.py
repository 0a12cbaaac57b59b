"""Structure of attention masks that the theorems on the unit head use: degrees and cliques."""

import math
import typing

import numpy as np
import numpy.typing as npt

# Longer masks of pairs are known by their degrees, unless all pairs of tokens are comparable.
_LONGEST = 2048


class Cliques(typing.NamedTuple):
    """Cover of the queries that see a key by cliques (Theorem 3.G).

    Of any two queries of a clique one sees the other. A query does not count for its own key.

    Attributes:
        root: largest sum over the cliques of a key of the square roots of their sizes.
        symmetric: whether two tokens see each other or not at all.
    """

    root: float
    symmetric: bool


def mask_degrees(mask: npt.ArrayLike) -> tuple[int, int]:
    """Largest number of other keys a query sees, and of other queries that see a key.

    Args:
        mask: array of shape `(N, N)` or `(..., N, N)`, true where query `i` sees key `j`. The
            diagonal does not matter: a token always sees itself. With leading axes the degrees
            are the largest over them.

    Returns:
        `(n_keys, n_queries)`, two integers.

    Raises:
        ValueError: if the last two axes are not square.
    """
    others = _others(mask)
    if others.size == 0:
        return 0, 0
    return int(others.sum(axis=-1).max()), int(others.sum(axis=-2).max())


def mask_cliques(mask: npt.ArrayLike) -> Cliques | None:
    """The cliques of Theorem 3.G of a mask, found in the order of the tokens.

    They are the fewest for full, causal, window, block and prefix masks. Others get more than they
    need, which makes the constant larger but not wrong.

    Args:
        mask: see `mask_degrees`. With leading axes the result holds for each mask.

    Returns:
        `Cliques`, or `None` where the search would take too long.

    Raises:
        ValueError: if the last two axes are not square.

    Example, a window of three tokens on either side:

    >>> import numpy as np
    >>> from keras_lipattn.bounds import mask_cliques
    >>> position = np.arange(9)
    >>> mask_cliques(abs(position[:, None] - position) <= 3)
    Cliques(root=3.4641016151377544, symmetric=True)
    """
    others = _others(mask)
    if others.size == 0:
        return Cliques(0.0, True)
    symmetric = bool((others == np.swapaxes(others, -1, -2)).all())
    root = 0.0
    for visible in others.reshape(-1, *others.shape[-2:]):
        comparable = visible | visible.T | np.eye(len(visible), dtype=bool)
        if comparable.all():
            own = math.sqrt(int(visible.sum(axis=0).max()))
        elif len(visible) <= _LONGEST:
            own = _root_of_runs(visible, comparable)
        else:
            return None
        root = max(root, own)
    return Cliques(root, symmetric)


def _root_of_runs(visible: np.ndarray, comparable: np.ndarray) -> float:
    """`root` for cliques of consecutive queries among those that see a key."""
    size = len(visible)
    rows = np.packbits(comparable, axis=1)
    # By key: the tokens that are comparable with every query of the last clique, and its size.
    common = np.full_like(rows, 255)
    count, total = np.zeros(size), np.zeros(size)
    for query in range(size):
        keys = np.flatnonzero(visible[query])
        bits = common[keys, query >> 3] >> (7 - (query & 7))
        ended = keys[(bits & 1) == 0]
        total[ended] += np.sqrt(count[ended])
        count[ended] = 0.0
        common[ended] = 255
        common[keys] &= rows[query]
        count[keys] += 1.0
    return float((total + np.sqrt(count)).max())


def require_square(mask: np.ndarray) -> None:
    """Raises a `ValueError` unless the last two axes of a mask are equal."""
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(
            "`mask` must be square, of shape `(..., N, N)`: queries and keys of self-attention "
            f"are the same tokens. Received: shape={mask.shape}"
        )


def _others(mask: npt.ArrayLike) -> np.ndarray:
    mask = np.asarray(mask)
    require_square(mask)
    return mask.astype(bool) & ~np.eye(mask.shape[-1], dtype=bool)
