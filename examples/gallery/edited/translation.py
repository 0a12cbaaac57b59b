"""Translation: encoder and decoder, cross-attention, padding masks from embeddings."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import CenterNormalization, L2MultiHeadAttention, Residual, SpectralDense

EMBED_DIM = 32
LATENT_DIM = 64
NUM_HEADS = 4


class TransformerEncoder(layers.Layer):
    def __init__(self, embed_dim, dense_dim, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.embed_dim = embed_dim
        self.dense_dim = dense_dim
        self.num_heads = num_heads
        self.attention = L2MultiHeadAttention(
            num_heads=num_heads, key_dim=embed_dim, lipschitz_bound=1.0
        )
        self.dense_proj = keras.Sequential(
            [
                SpectralDense(dense_dim, activation="relu"),
                SpectralDense(embed_dim),
            ]
        )
        self.layernorm_1 = CenterNormalization()
        self.layernorm_2 = layers.LayerNormalization(epsilon=1.0)
        self.residual_1 = Residual(alpha=0.5)
        self.residual_2 = Residual(alpha=0.5)
        self.supports_masking = True

    def call(self, inputs, mask=None):
        padding_mask = None
        if mask is not None:
            padding_mask = ops.cast(mask[:, None, :], dtype="int32")
        attention_output = self.attention(
            query=inputs, value=inputs, key=inputs, attention_mask=padding_mask
        )
        proj_input = self.layernorm_1(self.residual_1([inputs, attention_output]))
        proj_output = self.dense_proj(proj_input)
        return self.layernorm_2(self.residual_2([proj_input, proj_output]))

    def get_config(self):
        sizes = {
            "embed_dim": self.embed_dim,
            "dense_dim": self.dense_dim,
            "num_heads": self.num_heads,
        }
        return {**super().get_config(), **sizes}


class PositionalEmbedding(layers.Layer):
    def __init__(self, sequence_length, vocab_size, embed_dim, **kwargs):
        super().__init__(**kwargs)
        self.token_embeddings = layers.Embedding(
            input_dim=vocab_size, output_dim=embed_dim, mask_zero=True
        )
        self.position_embeddings = layers.Embedding(input_dim=sequence_length, output_dim=embed_dim)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim

    def call(self, inputs):
        length = ops.shape(inputs)[-1]
        positions = ops.arange(0, length, 1)
        embedded_tokens = self.token_embeddings(inputs)
        embedded_positions = self.position_embeddings(positions)
        return embedded_tokens + embedded_positions

    def compute_mask(self, inputs, mask=None):
        return self.token_embeddings.compute_mask(inputs)

    def get_config(self):
        sizes = {
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "embed_dim": self.embed_dim,
        }
        return {**super().get_config(), **sizes}


class TransformerDecoder(layers.Layer):
    def __init__(self, embed_dim, latent_dim, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.embed_dim = embed_dim
        self.latent_dim = latent_dim
        self.num_heads = num_heads
        self.attention_1 = L2MultiHeadAttention(
            num_heads=num_heads, key_dim=embed_dim, lipschitz_bound=1.0
        )
        self.attention_2 = layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim)
        self.dense_proj = keras.Sequential(
            [
                SpectralDense(latent_dim, activation="relu"),
                SpectralDense(embed_dim),
            ]
        )
        self.layernorm_1 = layers.LayerNormalization(epsilon=1.0)
        self.layernorm_2 = CenterNormalization()
        self.layernorm_3 = CenterNormalization()
        self.residual_1 = Residual(alpha=0.5)
        self.residual_2 = Residual(alpha=0.5)
        self.residual_3 = Residual(alpha=0.5)
        self.supports_masking = True

    def call(self, inputs, mask=None):
        inputs, encoder_outputs = inputs
        causal_mask = self.get_causal_attention_mask(inputs)
        if mask is None:
            inputs_padding_mask, encoder_outputs_padding_mask = None, None
        else:
            inputs_padding_mask, encoder_outputs_padding_mask = mask
        attention_output_1 = self.attention_1(
            query=inputs,
            value=inputs,
            key=inputs,
            attention_mask=causal_mask,
            query_mask=inputs_padding_mask,
        )
        out_1 = self.layernorm_1(self.residual_1([inputs, attention_output_1]))
        attention_output_2 = self.attention_2(
            query=out_1,
            value=encoder_outputs,
            key=encoder_outputs,
            query_mask=inputs_padding_mask,
            key_mask=encoder_outputs_padding_mask,
        )
        out_2 = self.layernorm_2(self.residual_2([out_1, attention_output_2]))
        proj_output = self.dense_proj(out_2)
        return self.layernorm_3(self.residual_3([out_2, proj_output]))

    def get_causal_attention_mask(self, inputs):
        input_shape = ops.shape(inputs)
        batch_size, sequence_length = input_shape[0], input_shape[1]
        i = ops.arange(sequence_length)[:, None]
        j = ops.arange(sequence_length)
        mask = ops.cast(i >= j, dtype="int32")
        mask = ops.reshape(mask, (1, sequence_length, sequence_length))
        return ops.tile(mask, (batch_size, 1, 1))

    def get_config(self):
        sizes = {
            "embed_dim": self.embed_dim,
            "latent_dim": self.latent_dim,
            "num_heads": self.num_heads,
        }
        return {**super().get_config(), **sizes}


def make_model():
    length, vocabulary = batches.SENTENCE_LENGTH, batches.VOCABULARY
    encoder_inputs = keras.Input(shape=(length,), dtype="int64", name="encoder_inputs")
    x = PositionalEmbedding(length, vocabulary, EMBED_DIM)(encoder_inputs)
    encoder_outputs = TransformerEncoder(EMBED_DIM, LATENT_DIM, NUM_HEADS)(x)

    decoder_inputs = keras.Input(shape=(length,), dtype="int64", name="decoder_inputs")
    x = PositionalEmbedding(length, vocabulary, EMBED_DIM)(decoder_inputs)
    x = TransformerDecoder(EMBED_DIM, LATENT_DIM, NUM_HEADS)([x, encoder_outputs])
    x = layers.Dropout(0.5)(x)
    decoder_outputs = SpectralDense(vocabulary, activation="softmax")(x)
    model = keras.Model(
        {"encoder_inputs": encoder_inputs, "decoder_inputs": decoder_inputs},
        decoder_outputs,
        name="translation",
    )
    model.compile("rmsprop", loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=0))
    return model
