"""Conversion of a model with dot-product attention to one with a Lipschitz constant."""

from keras_lipattn.conversion.converting import Conversion, convert_attention

__all__ = ["Conversion", "convert_attention"]
