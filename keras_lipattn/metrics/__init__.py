"""Metrics of certified robustness."""

from keras_lipattn.metrics.certified_accuracy import CertifiedAccuracy

__all__ = ["CertifiedAccuracy"]
