"""Time-series classification with a Transformer: attention, then a feed-forward of Conv1D."""

import keras
from keras import layers

from examples.gallery import batches
from keras_lipattn import CenterNormalization, L2MultiHeadAttention, Residual, SpectralDense


def transformer_encoder(inputs, head_size, num_heads, ff_dim, dropout=0.0):
    # Attention and normalization
    x = L2MultiHeadAttention(
        key_dim=head_size, num_heads=num_heads, dropout=dropout, lipschitz_bound=1.0
    )(inputs, inputs)
    x = layers.Dropout(dropout)(x)
    x = CenterNormalization()(x)
    res = Residual(alpha=0.5)([inputs, x])

    # Feed-forward part
    x = SpectralDense(ff_dim, activation="relu")(res)
    x = layers.Dropout(dropout)(x)
    x = SpectralDense(inputs.shape[-1])(x)
    x = CenterNormalization()(x)
    return Residual(alpha=0.5)([res, x])


def make_model(
    head_size=16,
    num_heads=4,
    ff_dim=4,
    num_transformer_blocks=4,
    mlp_units=(32,),
    dropout=0.25,
    mlp_dropout=0.4,
):
    inputs = keras.Input(shape=batches.SERIES_SHAPE)
    # Centering one channel would leave nothing of it.
    x = SpectralDense(8)(inputs)
    for _ in range(num_transformer_blocks):
        x = transformer_encoder(x, head_size, num_heads, ff_dim, dropout)
    x = layers.GlobalAveragePooling1D(data_format="channels_last")(x)
    for dim in mlp_units:
        x = SpectralDense(dim, activation="relu")(x)
        x = layers.Dropout(mlp_dropout)(x)
    outputs = SpectralDense(2, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name="timeseries_transformer")
    model.compile(
        loss="sparse_categorical_crossentropy",
        optimizer=keras.optimizers.Adam(learning_rate=1e-4),
        metrics=["sparse_categorical_accuracy"],
    )
    return model
