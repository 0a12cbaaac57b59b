"""Custom layers and models as users write them, for random models."""

import functools

import keras
from keras import layers, ops
from keras.src import backend

import keras_lipattn


class TransformerBlock(layers.Layer):
    """The Transformer block of Keras examples, without `build`: normalization before or after."""

    def __init__(self, width, *, first=True, lipschitz=False, causal=False, rate=0.1):
        super().__init__()
        heads = keras_lipattn.L2MultiHeadAttention if lipschitz else layers.MultiHeadAttention
        self.attention = heads(2, 2)
        self.feed_forward = keras.Sequential(
            [layers.Dense(width + 1, activation="relu"), layers.Dense(width)]
        )
        self.norm1 = layers.LayerNormalization(epsilon=0.1)
        self.norm2 = layers.LayerNormalization(epsilon=0.1)
        self.dropout = layers.Dropout(rate)
        self.first, self.causal = first, causal
        self.supports_masking = True

    def attend(self, x):
        options = {"use_causal_mask": True} if self.causal else {}
        return self.attention(x, x, **options)

    def call(self, inputs, training=None):
        if self.first:
            x = inputs + self.dropout(self.attend(self.norm1(inputs)), training=training)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(inputs + self.dropout(self.attend(inputs), training=training))
        return self.norm2(x + self.feed_forward(x))


class BuiltBlock(layers.Layer):
    """A layer with its own weights, which builds its sublayers."""

    def build(self, input_shape):
        width = input_shape[-1]
        self.scale = self.add_weight(shape=(width,), name="scale")
        self.kernel = self.add_weight(shape=(width, width), name="kernel")
        self.norm = layers.LayerNormalization(epsilon=0.1)
        self.norm.build(input_shape)

    def call(self, inputs):
        return ops.tanh(ops.matmul(self.norm(inputs), self.kernel)) * self.scale


class OwnHeads(layers.Layer):
    """Attention from operations: heads move to the batch axis and back."""

    def __init__(self, heads=2, size=2):
        super().__init__()
        self.heads, self.size = heads, size
        self.norm = layers.LayerNormalization(epsilon=0.1)
        self.query, self.key, self.value = (layers.Dense(heads * size) for _ in range(3))

    def split(self, x):
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        x = ops.reshape(x, (batch, length, self.heads, self.size))
        return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, length, self.size))

    def call(self, inputs):
        x = self.norm(inputs)
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = ops.matmul(q, ops.transpose(k, (0, 2, 1))) / self.size**0.5
        x = ops.matmul(ops.softmax(scores, axis=-1), v)
        length = ops.shape(inputs)[1]
        x = ops.reshape(x, (-1, self.heads, length, self.size))
        x = ops.transpose(x, (0, 2, 1, 3))
        return ops.reshape(x, (-1, length, self.heads * self.size))


class Folded(layers.Layer):
    """A layer on slices that move to the batch axis: `(B, H, T, d)` to `(B*H, T, d)` and back."""

    def __init__(self, inner, halves=2):
        super().__init__()
        self.inner, self.halves = inner, halves

    def call(self, inputs):
        length, width = ops.shape(inputs)[1], inputs.shape[-1] // self.halves
        x = ops.reshape(inputs, (-1, length, self.halves, width))
        x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, length, width))
        x = self.inner(x)
        x = ops.reshape(x, (-1, self.halves, length, x.shape[-1]))
        x = ops.transpose(x, (0, 2, 1, 3))
        return ops.reshape(x, (-1, length, self.halves * x.shape[-1]))


class Repeated(layers.Layer):
    """Repeats every example and averages the copies; `tile` mixes their order."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def call(self, inputs):
        if self.how == "repeat":
            x = self.inner(ops.repeat(inputs, 3, axis=0))
            x = ops.reshape(x, (-1, 3, *ops.shape(x)[1:]))
            return ops.mean(x, axis=1)
        if self.how == "tile":
            x = self.inner(ops.tile(inputs, (2, 1, 1)))
            x = ops.reshape(x, (2, -1, *ops.shape(x)[1:]))
            return ops.sum(x, axis=0)
        x = ops.broadcast_to(inputs[:, None], (ops.shape(inputs)[0], 2, *ops.shape(inputs)[1:]))
        return ops.max(self.inner(x), axis=1)


class ClassToken(layers.Layer):
    """Adds a learned token in front, the same for every example."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def build(self, input_shape):
        self.token = self.add_weight(shape=(1, 1, input_shape[-1]), name="token")

    def call(self, inputs):
        batch = ops.shape(inputs)[0]
        if self.how == "tile":
            token = ops.tile(self.token, (batch, 1, 1))
        elif self.how == "repeat":
            token = ops.repeat(self.token, batch, axis=0)
        else:
            token = ops.broadcast_to(self.token, (batch, 1, inputs.shape[-1]))
        return ops.concatenate([ops.cast(token, inputs.dtype), inputs], axis=1)


class Positions(layers.Layer):
    """Learned position embeddings, as in Keras examples."""

    def __init__(self, length, width):
        super().__init__()
        self.embedding = layers.Embedding(length, width)
        self.supports_masking = True

    def call(self, inputs):
        return inputs + self.embedding(ops.arange(0, ops.shape(inputs)[1]))


class SqueezeExcite(layers.Layer):
    """Multiplies features by a gate computed from their means."""

    def __init__(self, width):
        super().__init__()
        self.squeeze = layers.Dense(2, activation="relu")
        self.excite = layers.Dense(width, activation="sigmoid")

    def call(self, inputs):
        axes = tuple(range(1, len(inputs.shape) - 1))
        gate = self.excite(self.squeeze(ops.mean(inputs, axis=axes)))
        return inputs * ops.reshape(gate, (-1, *[1] * len(axes), inputs.shape[-1]))


class MaskedMean(layers.Layer):
    """Mean of the visible tokens; without a mask from Keras, all are visible."""

    def call(self, inputs, mask=None):
        if mask is None:
            return ops.mean(inputs, axis=1)
        weights = ops.cast(mask, inputs.dtype)[:, :, None]
        return ops.sum(inputs * weights, axis=1) / ops.maximum(ops.sum(weights, axis=1), 1.0)


class NamedMask(layers.Layer):
    """Takes the mask of one of its tensors as an argument and passes it to attention."""

    def __init__(self, *, lipschitz):
        super().__init__()
        heads = keras_lipattn.L2MultiHeadAttention if lipschitz else layers.MultiHeadAttention
        self.attention = heads(2, 2)

    def call(self, tokens, gate, tokens_mask=None):
        mask = None if tokens_mask is None else tokens_mask[:, None, :]
        return self.attention(tokens, tokens, attention_mask=mask) * ops.sigmoid(gate)


class MaskedScores(layers.Layer):
    """Attention from operations with `Softmax()(scores, mask)`."""

    def __init__(self, width):
        super().__init__()
        self.norm = layers.LayerNormalization(epsilon=0.1)
        self.key = layers.Dense(width)
        self.softmax = layers.Softmax()

    def call(self, inputs, mask=None):
        x = self.norm(inputs)
        scores = ops.einsum("btd,bsd->bts", x, self.key(x))
        if mask is None:
            return ops.matmul(self.softmax(scores), x)
        # The mask of `Softmax` has the shape of its input.
        visible = ops.logical_and(mask[:, None, :], ops.ones_like(scores, "bool"))
        return ops.matmul(self.softmax(scores, mask=visible), x)


class GiveMask(layers.Layer):
    """Sets the mask of its output in `call`."""

    def call(self, inputs, visible):
        output = 1.0 * inputs
        backend.set_keras_mask(output, visible)
        return output


class Decoder(layers.Layer):
    """Causal self-attention, then attention to the output of an encoder."""

    def __init__(self, width, *, bounded=False):
        super().__init__()
        heads = layers.MultiHeadAttention
        if bounded:
            heads = functools.partial(keras_lipattn.BoundedMultiHeadAttention, token_radius=1.5)
        self.own, self.cross = heads(1, 2), heads(1, 2)
        self.norms = [layers.LayerNormalization(epsilon=0.1) for _ in range(3)]
        self.dense = layers.Dense(width, activation="tanh")

    def call(self, inputs, memory):
        x = self.norms[0](inputs)
        x = inputs + self.own(x, x, use_causal_mask=True)
        x = x + self.cross(self.norms[1](x), memory)
        return x + self.dense(self.norms[2](x))


class Chain(keras.Model):
    """A subclassed model that calls blocks in turn."""

    def __init__(self, blocks, classes):
        super().__init__()
        self.blocks = blocks
        self.pool = layers.GlobalAveragePooling1D()
        self.classifier = layers.Dense(classes)

    def call(self, inputs, training=None):
        x = inputs
        for block in self.blocks:
            if isinstance(block, TransformerBlock):
                x = block(x, training=training)
            else:
                x = block(x)
        return self.classifier(self.pool(x))


class TwoTowers(keras.Model):
    """A subclassed model that uses one block twice, on changed inputs."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.add = keras_lipattn.Residual(0.3)

    def call(self, inputs):
        return self.add([self.block(inputs), self.block(0.5 * inputs + 0.1)])
