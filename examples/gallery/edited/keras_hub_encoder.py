"""The `TransformerEncoder` of keras-hub, with a padding mask and another attention inside."""

import keras
import keras_hub  # pyright: ignore[reportMissingImports]
from keras import layers

from examples.gallery import batches
from keras_lipattn import CenterNormalization, L2MultiHeadAttention, SpectralDense

EMBED_DIM = 32
NUM_HEADS = 4
INTERMEDIATE_DIM = 64


class TransformerEncoder(keras_hub.layers.TransformerEncoder):
    def build(self, inputs_shape):
        super().build(inputs_shape)
        width = inputs_shape[-1]
        del self._self_attention_layer
        self._self_attention_layer = L2MultiHeadAttention(
            self.num_heads,
            width // self.num_heads,
            lipschitz_bound=1.0,
            name="self_attention_layer",
        )
        self._self_attention_layer.build(inputs_shape, inputs_shape)
        del self._self_attention_layer_norm, self._feedforward_layer_norm
        self._self_attention_layer_norm = CenterNormalization(name="self_attention_layer_norm")
        self._self_attention_layer_norm.build(inputs_shape)
        self._feedforward_layer_norm = CenterNormalization(name="feedforward_layer_norm")
        self._feedforward_layer_norm.build(inputs_shape)
        del self._feedforward_intermediate_dense, self._feedforward_output_dense
        self._feedforward_intermediate_dense = SpectralDense(
            self.intermediate_dim, self.activation, name="feedforward_intermediate_dense"
        )
        self._feedforward_intermediate_dense.build(inputs_shape)
        self._feedforward_output_dense = SpectralDense(width, name="feedforward_output_dense")
        self._feedforward_output_dense.build((*inputs_shape[:-1], self.intermediate_dim))


def make_model():
    inputs = keras.Input(shape=(batches.TEXT_LENGTH,), dtype="int32")
    x = keras_hub.layers.TokenAndPositionEmbedding(
        batches.VOCABULARY, batches.TEXT_LENGTH, EMBED_DIM, mask_zero=True
    )(inputs)
    for _ in range(2):
        x = TransformerEncoder(INTERMEDIATE_DIM, NUM_HEADS)(x)
    x = layers.GlobalAveragePooling1D()(x)
    outputs = SpectralDense(2, activation="sigmoid")(x)
    model = keras.Model(inputs, outputs, name="keras_hub_encoder")
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    return model
