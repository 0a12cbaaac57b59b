"""From a model with dot-product attention to one that has a Lipschitz constant."""

from keras_lipattn.conversion.conversion import Conversion
from keras_lipattn.conversion.convert_attention import convert_attention

__all__ = ["Conversion", "convert_attention"]
