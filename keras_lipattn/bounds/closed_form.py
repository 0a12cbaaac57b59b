"""Theorem 3.A of docs/theory.md: 2-norm of the unit head in closed form."""

import math

from keras_lipattn.bounds.column_majorant import SQUARE_MAJORANT
from keras_lipattn.bounds.scalars import phi_inv
from keras_lipattn.linalg import SAFETY

# W0(1/e), rounded up: the largest value of K log(1/K) / (1 + K).
ENTROPY_PEAK = 0.278465


def closed_form_bound(tokens: int, mask: str) -> float:
    """Theorem 3.A for `mask` `"full"` or `"causal"` and `tokens >= 1`."""
    phi = phi_inv(tokens - 1)
    column = math.sqrt(tokens if mask == "full" else 2.0 * tokens)
    return SAFETY * (
        math.sqrt(column) + 2.0 * phi + 2.0 * math.sqrt(SQUARE_MAJORANT * phi * column)
    )


def closed_form_degree_bound(n_keys: int, n_queries: int) -> float:
    """Theorem 3.A for any mask with diagonal.

    Args:
        n_keys: largest number of other keys a query sees.
        n_queries: largest number of other queries that see a key.
    """
    phi = phi_inv(n_keys)
    return SAFETY * (
        math.sqrt(1.0 + n_queries / 2.0)
        + 2.0 * phi
        + 2.0 * math.sqrt(ENTROPY_PEAK * phi * n_queries)
    )
