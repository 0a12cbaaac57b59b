"""Losses that turn a Lipschitz bound into certified radii."""

from keras_lipattn.losses.margin_crossentropy import MarginCrossentropy

__all__ = ["MarginCrossentropy"]
