"""The rules, one module per family of layers. Importing the package registers them all."""

from keras_lipattn.certify.rules import (
    activations,
    attention,
    convolution,
    embedding,
    invertible,
    linear,
    lipschitz_layers,
    masking,
    merging,
    normalization,
    operations,
    pooling,
    recurrent,
    regularization,
    reshaping,
    wrappers,
)

__all__ = [
    "activations",
    "attention",
    "convolution",
    "embedding",
    "invertible",
    "linear",
    "lipschitz_layers",
    "masking",
    "merging",
    "normalization",
    "operations",
    "pooling",
    "recurrent",
    "regularization",
    "reshaping",
    "wrappers",
]
