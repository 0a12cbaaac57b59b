"""Operator norms of matrices."""

from keras_lipattn.linalg.content import cached_by_content, computed_from
from keras_lipattn.linalg.exact import SAFETY, fast_operator_norm, operator_norm

__all__ = ["SAFETY", "cached_by_content", "computed_from", "fast_operator_norm", "operator_norm"]
