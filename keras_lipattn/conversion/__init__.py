"""Conversion of ordinary models to models with a Lipschitz constant."""

from keras_lipattn.conversion.conversion_report import LipschitzConversion
from keras_lipattn.conversion.converting import Conversion, convert_attention
from keras_lipattn.conversion.lipschitz_copy import make_lipschitz

__all__ = ["Conversion", "LipschitzConversion", "convert_attention", "make_lipschitz"]
