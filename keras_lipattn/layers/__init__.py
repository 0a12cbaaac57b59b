"""Layers with a proven Lipschitz constant."""

from keras_lipattn.layers.bounded_multi_head_attention import BoundedMultiHeadAttention
from keras_lipattn.layers.center_normalization import CenterNormalization
from keras_lipattn.layers.condensing import condensed, lipschitz_layers
from keras_lipattn.layers.continuous_depth import ContinuousDepth
from keras_lipattn.layers.half_abs import HalfAbs
from keras_lipattn.layers.inversion import Inversion, InversionError, LogDeterminant
from keras_lipattn.layers.invertible_residual import InvertibleResidual
from keras_lipattn.layers.invertible_sequential import InvertibleSequential
from keras_lipattn.layers.l2_multi_head_attention import L2MultiHeadAttention
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer, Tracking
from keras_lipattn.layers.max_min import MaxMin
from keras_lipattn.layers.norm_pooling import NormPooling
from keras_lipattn.layers.normalized_dense import NormalizedDense
from keras_lipattn.layers.orthogonal_conv2d import OrthogonalConv2D
from keras_lipattn.layers.orthogonal_dense import OrthogonalDense
from keras_lipattn.layers.position_embedding import PositionEmbedding
from keras_lipattn.layers.residual import Residual
from keras_lipattn.layers.scaled_cosine_attention import ScaledCosineAttention
from keras_lipattn.layers.self_attention import SelfAttention
from keras_lipattn.layers.space_to_depth import SpaceToDepth
from keras_lipattn.layers.spectral_conv2d import SpectralConv2D
from keras_lipattn.layers.spectral_dense import SpectralDense
from keras_lipattn.layers.token_projection import TokenProjection
from keras_lipattn.layers.transformer_blocks import TransformerDecoder, TransformerEncoder

__all__ = [
    "BoundedMultiHeadAttention",
    "CenterNormalization",
    "ContinuousDepth",
    "HalfAbs",
    "Inversion",
    "InversionError",
    "InvertibleResidual",
    "InvertibleSequential",
    "L2MultiHeadAttention",
    "LipschitzLayer",
    "LogDeterminant",
    "MaxMin",
    "NormPooling",
    "NormalizedDense",
    "OrthogonalConv2D",
    "OrthogonalDense",
    "PositionEmbedding",
    "Residual",
    "ScaledCosineAttention",
    "SelfAttention",
    "SpaceToDepth",
    "SpectralConv2D",
    "SpectralDense",
    "TokenProjection",
    "Tracking",
    "TransformerDecoder",
    "TransformerEncoder",
    "condensed",
    "lipschitz_layers",
]
