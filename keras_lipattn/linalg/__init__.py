"""Operator norms of matrices."""

from keras_lipattn.linalg.exact import SAFETY, fast_operator_norm, operator_norm

__all__ = ["SAFETY", "fast_operator_norm", "operator_norm"]
