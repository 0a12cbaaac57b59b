"""Self-attention with a proven Lipschitz constant, for Keras 3."""

# ruff: noqa: E402
from keras_lipattn._requirements import check_requirements

check_requirements()

from keras_lipattn import (
    callbacks,
    certification,
    distribution,
    evaluation,
    layers,
    losses,
    metrics,
)
from keras_lipattn.bounds import LipschitzBound
from keras_lipattn.callbacks import (
    DurableBackup,
    DurableCheckpoint,
    DurableCSVLogger,
    LipschitzMonitor,
)
from keras_lipattn.certification import Certificate, certified_radius, certify, register_rule
from keras_lipattn.conversion import (
    Conversion,
    LipschitzConversion,
    convert_attention,
    make_lipschitz,
)
from keras_lipattn.estimation import LipschitzEstimate, estimate_lipschitz
from keras_lipattn.evaluation import RobustAccuracy, certified_accuracy
from keras_lipattn.export import ExportError, export_saved_model
from keras_lipattn.layers import (
    BoundedMultiHeadAttention,
    CenterNormalization,
    ContinuousDepth,
    HalfAbs,
    InvertibleResidual,
    InvertibleSequential,
    L2MultiHeadAttention,
    MaxMin,
    NormalizedDense,
    NormPooling,
    OrthogonalConv2D,
    OrthogonalDense,
    PositionEmbedding,
    Residual,
    ScaledCosineAttention,
    SpaceToDepth,
    SpectralConv2D,
    SpectralDense,
    TokenProjection,
    TransformerDecoder,
    TransformerEncoder,
    condensed,
)
from keras_lipattn.version import __version__

__all__ = [
    "BoundedMultiHeadAttention",
    "CenterNormalization",
    "Certificate",
    "ContinuousDepth",
    "Conversion",
    "DurableBackup",
    "DurableCSVLogger",
    "DurableCheckpoint",
    "ExportError",
    "HalfAbs",
    "InvertibleResidual",
    "InvertibleSequential",
    "L2MultiHeadAttention",
    "LipschitzBound",
    "LipschitzConversion",
    "LipschitzEstimate",
    "LipschitzMonitor",
    "MaxMin",
    "NormPooling",
    "NormalizedDense",
    "OrthogonalConv2D",
    "OrthogonalDense",
    "PositionEmbedding",
    "Residual",
    "RobustAccuracy",
    "ScaledCosineAttention",
    "SpaceToDepth",
    "SpectralConv2D",
    "SpectralDense",
    "TokenProjection",
    "TransformerDecoder",
    "TransformerEncoder",
    "__version__",
    "callbacks",
    "certification",
    "certified_accuracy",
    "certified_radius",
    "certify",
    "condensed",
    "convert_attention",
    "distribution",
    "estimate_lipschitz",
    "evaluation",
    "export_saved_model",
    "layers",
    "losses",
    "make_lipschitz",
    "metrics",
    "register_rule",
]
