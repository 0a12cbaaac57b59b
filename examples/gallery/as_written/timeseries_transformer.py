"""Time-series classification with a Transformer: attention, then a feed-forward of Conv1D."""

import keras
from keras import layers

from examples.gallery import batches
from keras_lipattn import L2MultiHeadAttention


def transformer_encoder(inputs, head_size, num_heads, ff_dim, dropout=0.0):
    # Attention and normalization
    x = L2MultiHeadAttention(
        key_dim=head_size, num_heads=num_heads, dropout=dropout, lipschitz_bound=1.0
    )(inputs, inputs)
    x = layers.Dropout(dropout)(x)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    res = x + inputs

    # Feed-forward part
    x = layers.Conv1D(filters=ff_dim, kernel_size=1, activation="relu")(res)
    x = layers.Dropout(dropout)(x)
    x = layers.Conv1D(filters=inputs.shape[-1], kernel_size=1)(x)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    return x + res


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
    x = inputs
    for _ in range(num_transformer_blocks):
        x = transformer_encoder(x, head_size, num_heads, ff_dim, dropout)
    x = layers.GlobalAveragePooling1D(data_format="channels_last")(x)
    for dim in mlp_units:
        x = layers.Dense(dim, activation="relu")(x)
        x = layers.Dropout(mlp_dropout)(x)
    outputs = layers.Dense(2, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name="timeseries_transformer")
    model.compile(
        loss="sparse_categorical_crossentropy",
        optimizer=keras.optimizers.Adam(learning_rate=1e-4),
        metrics=["sparse_categorical_accuracy"],
    )
    return model
