"""Certified accuracy of classifiers, and their accuracy under attack."""

from keras_lipattn.evaluation.accuracy import RobustAccuracy, certified_accuracy

__all__ = ["RobustAccuracy", "certified_accuracy"]
