"""Operator norms of matrices."""

from keras_lipattn.linalg.exact import (
    GRAM_SIDE,
    SAFETY,
    fast_operator_norm,
    gram_norm,
    operator_norm,
)

__all__ = ["GRAM_SIDE", "SAFETY", "fast_operator_norm", "gram_norm", "operator_norm"]
