"""Operator norms of matrices."""

from keras_lipattn.linalg.exact import SAFETY, operator_norm

__all__ = ["SAFETY", "operator_norm"]
