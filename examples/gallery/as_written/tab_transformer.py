"""Structured data with a TabTransformer: strings looked up and embedded, with numbers."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import L2MultiHeadAttention

EMBEDDING_DIMS = 16
NUM_HEADS = 4
NUM_TRANSFORMER_BLOCKS = 2
DROPOUT_RATE = 0.2
MLP_HIDDEN_UNITS = [32, 16]


def create_model_inputs():
    inputs = {}
    for name in batches.NUMERIC_FEATURES:
        inputs[name] = layers.Input(name=name, shape=(), dtype="float32")
    for name in batches.CATEGORICAL_FEATURES:
        inputs[name] = layers.Input(name=name, shape=(), dtype="string")
    return inputs


def encode_inputs(inputs):
    encoded_categorical = []
    for name, vocabulary in batches.CATEGORICAL_FEATURES.items():
        lookup = layers.StringLookup(
            vocabulary=vocabulary, mask_token=None, num_oov_indices=0, output_mode="int"
        )
        embedding = layers.Embedding(input_dim=len(vocabulary), output_dim=EMBEDDING_DIMS)
        encoded_categorical.append(embedding(lookup(inputs[name])))
    numerical = [ops.expand_dims(inputs[name], -1) for name in batches.NUMERIC_FEATURES]
    return encoded_categorical, numerical


def create_mlp(hidden_units, dropout_rate, activation, make_normalization, name=None):
    mlp_layers = []
    for units in hidden_units:
        mlp_layers.append(make_normalization())
        mlp_layers.append(layers.Dense(units, activation=activation))
        mlp_layers.append(layers.Dropout(dropout_rate))
    return keras.Sequential(mlp_layers, name=name)


def make_model():
    inputs = create_model_inputs()
    encoded_categorical, numerical = encode_inputs(inputs)
    encoded_categorical = ops.stack(encoded_categorical, axis=1)
    numerical = layers.concatenate(numerical)

    num_columns = encoded_categorical.shape[1]
    column_embedding = layers.Embedding(input_dim=num_columns, output_dim=EMBEDDING_DIMS)
    column_indices = ops.arange(start=0, stop=num_columns, step=1)
    encoded_categorical = encoded_categorical + column_embedding(column_indices)

    for block in range(NUM_TRANSFORMER_BLOCKS):
        attention_output = L2MultiHeadAttention(
            num_heads=NUM_HEADS,
            key_dim=EMBEDDING_DIMS,
            dropout=DROPOUT_RATE,
            lipschitz_bound=1.0,
            name=f"multihead_attention_{block}",
        )(encoded_categorical, encoded_categorical)
        x = layers.Add(name=f"skip_connection1_{block}")([attention_output, encoded_categorical])
        x = layers.LayerNormalization(name=f"layer_norm1_{block}", epsilon=1e-6)(x)
        feedforward_output = create_mlp(
            hidden_units=[EMBEDDING_DIMS],
            dropout_rate=DROPOUT_RATE,
            activation=keras.activations.gelu,
            make_normalization=lambda: layers.LayerNormalization(epsilon=1e-6),
            name=f"feedforward_{block}",
        )(x)
        x = layers.Add(name=f"skip_connection2_{block}")([feedforward_output, x])
        x = layers.LayerNormalization(name=f"layer_norm2_{block}", epsilon=1e-6)(x)
        encoded_categorical = x

    categorical = layers.Flatten()(encoded_categorical)
    numerical = layers.LayerNormalization(epsilon=1e-6)(numerical)
    features = layers.concatenate([categorical, numerical])
    features = create_mlp(
        hidden_units=MLP_HIDDEN_UNITS,
        dropout_rate=DROPOUT_RATE,
        activation=keras.activations.selu,
        make_normalization=layers.BatchNormalization,
        name="MLP",
    )(features)
    outputs = layers.Dense(units=1, activation="sigmoid", name="sigmoid")(features)
    model = keras.Model(inputs=inputs, outputs=outputs, name="tab_transformer")
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate=0.001, weight_decay=0.0001),
        loss=keras.losses.BinaryCrossentropy(),
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy")],
    )
    return model
