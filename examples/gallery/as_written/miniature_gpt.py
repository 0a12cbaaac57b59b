"""Text generation with a miniature GPT: a causal mask made by hand in a custom layer."""

import keras
from keras import layers, ops

from examples.gallery import batches
from keras_lipattn import L2MultiHeadAttention

EMBED_DIM = 32
NUM_HEADS = 2
FEED_FORWARD_DIM = 32


def causal_attention_mask(batch_size, n_dest, n_src, dtype):
    """True in the lower triangle, counted from the last key, once per example."""
    i = ops.arange(n_dest)[:, None]
    j = ops.arange(n_src)
    mask = ops.cast(i >= j - n_src + n_dest, dtype)
    mask = ops.reshape(mask, (1, n_dest, n_src))
    return ops.tile(mask, (batch_size, 1, 1))


class TransformerBlock(layers.Layer):
    def __init__(self, embed_dim, num_heads, ff_dim, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.att = L2MultiHeadAttention(num_heads, embed_dim, lipschitz_bound=1.0)
        self.ffn = keras.Sequential(
            [
                layers.Dense(ff_dim, activation="relu"),
                layers.Dense(embed_dim),
            ]
        )
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6)
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)

    def call(self, inputs):
        input_shape = ops.shape(inputs)
        batch_size = input_shape[0]
        seq_len = input_shape[1]
        causal_mask = causal_attention_mask(batch_size, seq_len, seq_len, "bool")
        attention_output = self.att(inputs, inputs, attention_mask=causal_mask)
        attention_output = self.dropout1(attention_output)
        out1 = self.layernorm1(inputs + attention_output)
        ffn_output = self.ffn(out1)
        ffn_output = self.dropout2(ffn_output)
        return self.layernorm2(out1 + ffn_output)


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, maxlen, vocab_size, embed_dim, **kwargs):
        super().__init__(**kwargs)
        self.token_emb = layers.Embedding(input_dim=vocab_size, output_dim=embed_dim)
        self.pos_emb = layers.Embedding(input_dim=maxlen, output_dim=embed_dim)

    def call(self, x):
        maxlen = ops.shape(x)[-1]
        positions = ops.arange(0, maxlen, 1)
        positions = self.pos_emb(positions)
        x = self.token_emb(x)
        return x + positions


def make_model():
    inputs = layers.Input(shape=(batches.TEXT_LENGTH,), dtype="int32")
    x = TokenAndPositionEmbedding(batches.TEXT_LENGTH, batches.VOCABULARY, EMBED_DIM)(inputs)
    x = TransformerBlock(EMBED_DIM, NUM_HEADS, FEED_FORWARD_DIM)(x)
    outputs = layers.Dense(batches.VOCABULARY)(x)
    model = keras.Model(inputs=inputs, outputs=[outputs, x], name="miniature_gpt")
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # The hidden states are an output without a loss.
    model.compile("adam", loss=[loss_fn, None])
    return model
