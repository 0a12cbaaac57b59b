"""Operator norms of matrices."""

from keras_lipattn.linalg.exact import (
    SAFETY,
    cached_by_content,
    fast_operator_norm,
    operator_norm,
)

__all__ = ["SAFETY", "cached_by_content", "fast_operator_norm", "operator_norm"]
