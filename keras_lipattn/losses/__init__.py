"""Losses that turn a Lipschitz bound into certified radii."""

from keras_lipattn.losses.margin_crossentropy import EfficientMarginCrossentropy, MarginCrossentropy
from keras_lipattn.losses.multiclass_hkr import MulticlassHKR

__all__ = ["EfficientMarginCrossentropy", "MarginCrossentropy", "MulticlassHKR"]
