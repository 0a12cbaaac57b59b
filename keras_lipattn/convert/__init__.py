"""From a model with dot-product attention to one that has a Lipschitz constant."""

from keras_lipattn.convert.conversion import Conversion
from keras_lipattn.convert.convert_attention import convert_attention

__all__ = ["Conversion", "convert_attention"]
