"""What to use in place of a layer that costs much, or has no bound."""

_ATTENTION = "L2MultiHeadAttention(lipschitz_bound=1)"
_NORMALIZATION = "CenterNormalization"
_DENSE = "SpectralDense(spectral_norm=1)"
_SPECTRAL = "SpectralDense(spectral_norm=1) on patches or channels"
_RECURRENT = f"{_ATTENTION} with `use_causal_mask=True`"
_ACTIVATION = "MaxMin, tanh or ReLU"
_AVERAGE = "GlobalAveragePooling1D"

# From the class of a row to what has a small constant in its place.
REPLACEMENTS = {
    "AdditiveAttention": _ATTENTION,
    "Attention": _ATTENTION,
    "DotProductAttention": _ATTENTION,
    "GroupedQueryAttention": _ATTENTION,
    "L2MultiHeadAttention": _ATTENTION,
    "MultiHeadAttention": _ATTENTION,
    "ScaledCosineAttention": "ScaledCosineAttention(lipschitz_bound=1)",
    "BatchNormalization": _NORMALIZATION,
    "GroupNormalization": _NORMALIZATION,
    "LayerNorm": _NORMALIZATION,
    "LayerNormalization": _NORMALIZATION,
    "Normalize": _NORMALIZATION,
    "RMSNorm": _NORMALIZATION,
    "RMSNormalization": _NORMALIZATION,
    "UnitNormalization": _NORMALIZATION,
    "Dense": _DENSE,
    "Dot": _DENSE,
    "Einsum": _DENSE,
    "EinsumDense": _DENSE,
    "Matmul": _DENSE,
    "SpectralDense": _DENSE,
    **{f"{kind}{rank}D": _SPECTRAL for kind in ("Conv", "SeparableConv") for rank in (1, 2, 3)},
    "Conv": _SPECTRAL,
    "Conv1DTranspose": _SPECTRAL,
    "Conv2DTranspose": _SPECTRAL,
    "Conv3DTranspose": _SPECTRAL,
    "DepthwiseConv1D": _SPECTRAL,
    "DepthwiseConv2D": _SPECTRAL,
    "Add": "Residual",
    "Subtract": "Residual",
    "Flatten": _AVERAGE,
    "GlobalMaxPooling1D": _AVERAGE,
    "Sum": "the mean, or GlobalAveragePooling1D",
    "ConvLSTM1D": _SPECTRAL,
    "ConvLSTM2D": _SPECTRAL,
    "ConvLSTM3D": _SPECTRAL,
    "Bidirectional": _ATTENTION,
    "GRU": _RECURRENT,
    "LSTM": _RECURRENT,
    "RNN": _RECURRENT,
    "SimpleRNN": _RECURRENT,
    "Activation": _ACTIVATION,
    "CELU": _ACTIVATION,
    "Celu": _ACTIVATION,
    "ELU": _ACTIVATION,
    "Exp": _ACTIVATION,
    "Gelu": _ACTIVATION,
    "ReLU": _ACTIVATION,
    "Sparsemax": _ACTIVATION,
    "Threshold": _ACTIVATION,
}
