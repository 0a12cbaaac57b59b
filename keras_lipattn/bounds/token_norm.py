"""Theorem 4 of docs/theory.md: the exact constant of the token norm."""

from keras_lipattn.bounds.scalars import s_star
from keras_lipattn.linalg import SAFETY


def token_norm_bound(n_keys: float) -> float:
    """`V = 1 + 4 S*`, the constant of the unit head in the token norm.

    Args:
        n_keys: largest number of other keys a query sees, `>= 0`.

    Returns:
        A float; attained when `n_keys` is even, for every mask with diagonal.
    """
    return SAFETY * (1.0 + 4.0 * s_star(n_keys))
