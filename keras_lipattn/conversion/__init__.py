"""Conversion of ordinary models to models with a Lipschitz constant."""

from keras_lipattn.conversion.converting import Conversion, convert_attention
from keras_lipattn.conversion.lipschitz_copy import LipschitzConversion, make_lipschitz

__all__ = ["Conversion", "LipschitzConversion", "convert_attention", "make_lipschitz"]
