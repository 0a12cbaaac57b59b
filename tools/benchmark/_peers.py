"""Layers to compare with, written as a user of Keras would write them."""

import keras
from keras import ops


def _split(x, num_heads):
    batch, length, features = ops.shape(x)
    heads = ops.reshape(x, (batch, length, num_heads, features // num_heads))
    return ops.transpose(heads, (0, 2, 1, 3))


def _join(heads):
    batch, num_heads, length, key_dim = ops.shape(heads)
    return ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), (batch, length, num_heads * key_dim))


class SpectralNormalizedAttention(keras.layers.Layer):
    """Dot-product attention with `keras.layers.SpectralNormalization` around its projections.

    Keras cannot wrap its own attention layer; its projections as `Dense` layers it can.
    """

    def __init__(self, num_heads, key_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim

    def build(self, input_shape):
        *_, features = input_shape
        inner = self.num_heads * self.key_dim
        wide, narrow = input_shape, (*input_shape[:-1], inner)
        self.query = self._dense(inner, wide)
        self.key = self._dense(inner, wide)
        self.value = self._dense(inner, wide)
        self.output_projection = self._dense(features, narrow)

    @staticmethod
    def _dense(units, input_shape):
        layer = keras.layers.SpectralNormalization(keras.layers.Dense(units))
        layer.build(input_shape)
        return layer

    def call(self, x, training=False):
        query, key, value = (
            ops.reshape(
                projection(x, training=training),
                (*ops.shape(x)[:-1], self.num_heads, self.key_dim),
            )
            for projection in (self.query, self.key, self.value)
        )
        mixed = ops.dot_product_attention(query, key, value)
        joined = ops.reshape(mixed, (*ops.shape(x)[:-1], self.num_heads * self.key_dim))
        return self.output_projection(joined, training=training)


class PlainDistanceAttention(keras.layers.Layer):
    """L2 attention as it is usually written: four projections, `|q|^2 + |k|^2 - 2 q.k`."""

    def __init__(self, num_heads, key_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim

    def build(self, input_shape):
        *_, features = input_shape
        inner = self.num_heads * self.key_dim
        self.query, self.key, self.value = (keras.layers.Dense(inner) for _ in range(3))
        self.output_projection = keras.layers.Dense(features)
        for projection in (self.query, self.key, self.value):
            projection.build(input_shape)
        self.output_projection.build((*input_shape[:-1], inner))

    def call(self, x, training=False):
        query, key, value = (
            _split(projection(x), self.num_heads)
            for projection in (self.query, self.key, self.value)
        )
        distances = (
            ops.sum(ops.square(query), axis=-1)[..., :, None]
            + ops.sum(ops.square(key), axis=-1)[..., None, :]
            - 2.0 * ops.matmul(query, ops.swapaxes(key, -1, -2))
        )
        weights = ops.softmax(-distances / self.key_dim**0.5, axis=-1)
        return self.output_projection(_join(ops.matmul(weights, value)))


class CachedAttention(keras.layers.MultiHeadAttention):
    """The standard layer, decoding with a cache of keys and a cache of values."""

    def init_cache(self, batch_size, length):
        shape = (batch_size, length, self.num_heads, self.key_dim)
        return ops.zeros(shape), ops.zeros(shape)

    def decode(self, inputs, cache, position):
        """Output `(B, S, D)` for the tokens from `position` on, and the new cache."""
        keys, values = cache
        keys = ops.slice_update(keys, (0, position, 0, 0), self.key_dense(inputs))
        values = ops.slice_update(values, (0, position, 0, 0), self.value_dense(inputs))
        rows = position + ops.arange(ops.shape(inputs)[1])
        visible = rows[:, None] >= ops.arange(ops.shape(keys)[1])[None, :]
        mixed = ops.dot_product_attention(
            self.query_dense(inputs), keys, values, mask=visible[None, None]
        )
        return self.output_dense(mixed), (keys, values)
