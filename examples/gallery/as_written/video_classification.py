"""Video classification: a Transformer encoder over features of frames, some of them padding."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import L2MultiHeadAttention

DENSE_DIM = 16
NUM_HEADS = 1


class PositionalEmbedding(layers.Layer):
    def __init__(self, sequence_length, output_dim, **kwargs):
        super().__init__(**kwargs)
        self.position_embeddings = layers.Embedding(
            input_dim=sequence_length, output_dim=output_dim
        )
        self.sequence_length = sequence_length
        self.output_dim = output_dim

    def build(self, input_shape):
        self.position_embeddings.build(input_shape)

    def call(self, inputs):
        inputs = ops.cast(inputs, self.compute_dtype)
        length = ops.shape(inputs)[1]
        positions = ops.arange(start=0, stop=length, step=1)
        embedded_positions = self.position_embeddings(positions)
        return inputs + embedded_positions

    def compute_mask(self, inputs, mask=None):
        # Frames after the end of a video are zero.
        return ops.any(ops.cast(inputs, "bool"), axis=-1)

    def get_config(self):
        sizes = {"sequence_length": self.sequence_length, "output_dim": self.output_dim}
        return {**super().get_config(), **sizes}


class TransformerEncoder(layers.Layer):
    def __init__(self, embed_dim, dense_dim, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.embed_dim = embed_dim
        self.dense_dim = dense_dim
        self.num_heads = num_heads
        self.attention = L2MultiHeadAttention(
            num_heads=num_heads, key_dim=embed_dim, dropout=0.3, lipschitz_bound=1.0
        )
        self.dense_proj = keras.Sequential(
            [
                layers.Dense(dense_dim, activation=keras.activations.gelu),
                layers.Dense(embed_dim),
            ]
        )
        self.layernorm_1 = layers.LayerNormalization()
        self.layernorm_2 = layers.LayerNormalization()

    def call(self, inputs, mask=None):
        if mask is not None:
            mask = mask[:, None, :]
        attention_output = self.attention(inputs, inputs, attention_mask=mask)
        proj_input = self.layernorm_1(inputs + attention_output)
        proj_output = self.dense_proj(proj_input)
        return self.layernorm_2(proj_input + proj_output)

    def get_config(self):
        sizes = {
            "embed_dim": self.embed_dim,
            "dense_dim": self.dense_dim,
            "num_heads": self.num_heads,
        }
        return {**super().get_config(), **sizes}


def make_model():
    sequence_length, embed_dim = batches.VIDEO_SHAPE
    inputs = keras.Input(shape=(sequence_length, embed_dim))
    x = PositionalEmbedding(sequence_length, embed_dim, name="frame_position_embedding")(inputs)
    x = TransformerEncoder(embed_dim, DENSE_DIM, NUM_HEADS, name="transformer_layer")(x)
    x = layers.GlobalMaxPooling1D()(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(batches.CLASSES, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name="video_classification")
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
