"""The rules, one module per family of layers. Importing the package registers them all."""

from keras_lipattn.certification.rules import (
    activations,
    attention,
    convolution,
    embedding,
    images,
    linear,
    linear_operations,
    lipschitz_layers,
    merging,
    normalization,
    operations,
    other_layers,
    pooling,
    products,
    reshaping,
    wrappers,
)

__all__ = [
    "activations",
    "attention",
    "convolution",
    "embedding",
    "images",
    "linear",
    "linear_operations",
    "lipschitz_layers",
    "merging",
    "normalization",
    "operations",
    "other_layers",
    "pooling",
    "products",
    "reshaping",
    "wrappers",
]
