"""The model that benchmarks of whole models share."""

import keras

from keras_lipattn import CenterNormalization, L2MultiHeadAttention, Residual


def encoder(depth, width, length, *, heads=8, expansion=4, standard=False):
    """A transformer encoder over tokens `(length, width)` with a classifier of ten classes.

    Every one of the `depth` blocks adds attention and two dense layers to its input, each after a
    `CenterNormalization`.

    Args:
        depth: Number of blocks.
        width: Features of a token.
        length: Number of tokens.
        heads: Heads of each attention layer.
        expansion: How many times wider than a token the dense layers are inside.
        standard: Whether to use `keras.layers.MultiHeadAttention` for attention.
    """
    x = inputs = keras.Input((length, width))
    for _ in range(depth):
        normal = CenterNormalization()(x)
        if standard:
            mixed = keras.layers.MultiHeadAttention(heads, width // heads)(normal, normal)
        else:
            mixed = L2MultiHeadAttention(heads, width // heads)(normal)
        x = Residual()([x, mixed])
        hidden = keras.layers.Dense(expansion * width, "relu")(CenterNormalization()(x))
        x = Residual()([x, keras.layers.Dense(width)(hidden)])
    logits = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, logits)


def change_weights(model):
    """Moves every trainable weight a little, so that nothing remembered of the old ones fits."""
    for variable in model.trainable_variables:
        variable.assign(variable.value * 1.0001)
