"""Character-level Transformers which differ in their attention alone, and cached decoding.

Reference:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 5.3;
    Vaswani et al., "Attention is all you need", NeurIPS 2017 (the Transformer around it).
"""

import math
import typing
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_lipattn import (
    BoundedMultiHeadAttention,
    InvertibleResidual,
    L2MultiHeadAttention,
    LipschitzBound,
    MaxMin,
    OrthogonalDense,
    PositionEmbedding,
    TokenProjection,
)
from keras_lipattn.bounds import published_head_bound
from keras_lipattn.linalg.gram import gram_upper_bound

VARIANTS = (
    "dot_product",
    "dot_product, relative",
    "l2_untied",
    "l2",
    "l2, relative",
    "contractive, published bound",
    "contractive, our bound",
    "bounded tokens",
    "contractive, bounded tokens",
    "contractive, certified",
)
# Those with L2MultiHeadAttention in them, and those with BoundedMultiHeadAttention.
TIED, BOUNDED = VARIANTS[3:7], VARIANTS[7:]
# Without normalization, every layer with a constant close to 1.
CERTIFIED = VARIANTS[9]
COEFFICIENT = 0.95
# Distance from which on relative positions are not told apart.
REACH = 16
# Bias of the distance that a head of bounded tokens starts with, and scale of its query kernel.
START, QUERY_SCALE = 3.0, 0.02


class Size(typing.NamedTuple):
    """What the variants have in common; `width` is a multiple of `3 * heads`.

    Attributes:
        layers: number of blocks of attention and perceptron.
        width: number of features of a token.
        heads: number of heads.
        context: number of characters in a sequence.
    """

    layers: int
    width: int
    heads: int
    context: int


@keras.saving.register_keras_serializable(package="char_lm")
class RelativeAttention(keras.layers.Layer):
    """Causal dot-product attention with learned biases of its scores by relative position.

    `keras.layers.MultiHeadAttention` takes no such biases; but for them it is the same layer.
    """

    def __init__(self, num_heads, key_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim

    def build(self, input_shape):
        _, length, width = input_shape
        inner = self.num_heads * self.key_dim
        for name in ("query", "key", "value"):
            layer = keras.layers.Dense(inner, name=name)
            layer.build(input_shape)
            setattr(self, name, layer)
        self.out = keras.layers.Dense(width, name="output")
        self.out.build((None, length, inner))
        self.bias = self.add_weight(name="bias", shape=(self.num_heads, REACH), initializer="zeros")

    def call(self, inputs):
        length = inputs.shape[1]
        query, key, value = (
            ops.transpose(
                ops.reshape(layer(inputs), (-1, length, self.num_heads, self.key_dim)), (0, 2, 1, 3)
            )
            for layer in (self.query, self.key, self.value)
        )
        scores = ops.matmul(query / math.sqrt(self.key_dim), ops.swapaxes(key, -1, -2))
        # The own key has no bias, which softmax makes the unit of the others.
        table = ops.pad(ops.convert_to_tensor(self.bias), ((0, 0), (1, 0)))
        lag = np.subtract.outer(np.arange(length), np.arange(length))
        scores = scores + ops.take(table, np.clip(lag, 0, REACH), axis=1)
        heads = ops.matmul(ops.softmax(ops.where(lag >= 0, scores, -1e9)), value)
        heads = ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), (-1, length, self.query.units))
        return self.out(heads)

    def lipschitz(self, sequence_length=None, norm="l2", mask="causal"):
        """No constant: `blow_up.py` shows where the derivative grows without bound."""
        return _no_constant(norm, "dot-product attention has no Lipschitz constant")


@keras.saving.register_keras_serializable(package="char_lm")
class UntiedL2Attention(keras.layers.Layer):
    """Causal attention by distance whose keys are not those of its queries: no constant exists.

    With `Q = X W_Q`, `K = X W_K` it is `sum_h P_h Q_h W_Q,h^T W_V,h W_O,h / sqrt(k)`, where `P` is
    the softmax of `-|q_i - k_j|^2 / sqrt(k)`: the layer of the paper but for `W_K = W_Q`.
    """

    def __init__(self, num_heads, key_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim

    def build(self, input_shape):
        width, inner = input_shape[-1], self.num_heads * self.key_dim
        kernels = []
        for name in ("query", "key", "value", "output"):
            shape = (inner, width) if name == "output" else (width, inner)
            kernels.append(self.add_weight(name=name, shape=shape, initializer="glorot_uniform"))
        self.query, self.key, self.value, self.out = kernels
        self.bias = self.add_weight(name="bias", shape=(width,), initializer="zeros")

    def call(self, inputs):
        length = inputs.shape[1]
        heads = (-1, length, self.num_heads, self.key_dim)
        query, key = (
            ops.reshape(ops.matmul(inputs, kernel), heads) for kernel in (self.query, self.key)
        )
        scores = 2.0 * ops.einsum("bihk,bjhk->bhij", query, key)
        scores = scores - ops.transpose(ops.sum(key**2, axis=-1), (0, 2, 1))[:, :, None, :]
        hidden = np.triu(np.full((length, length), -1e9, "float32"), 1)
        weights = ops.softmax(scores / math.sqrt(self.key_dim) + hidden)
        mixed = ops.einsum("bhij,bjhk->bihk", weights, query)
        value = ops.reshape(ops.convert_to_tensor(self.value), (-1, *heads[2:]))
        kernel = ops.reshape(ops.convert_to_tensor(self.query), (-1, *heads[2:]))
        between = ops.einsum("dhk,dhv->hkv", kernel, value) / math.sqrt(self.key_dim)
        output = ops.einsum("bihk,hkv->bihv", mixed, between)
        output = ops.reshape(output, (-1, length, self.num_heads * self.key_dim))
        return ops.matmul(output, self.out) + self.bias

    def lipschitz(self, sequence_length=None, norm="l2", mask="causal"):
        """No constant: `blow_up.py` shows where the derivative grows without bound."""
        return _no_constant(norm, "the keys are not tied to the queries: no constant exists")


def _no_constant(norm, reason):
    return LipschitzBound(value=math.inf, norm=norm, kind="certified", theorem="", reason=reason)


@keras.saving.register_keras_serializable(package="char_lm")
class PublishedBoundAttention(L2MultiHeadAttention):
    """The same layer, which tells those who divide by its bound the published one."""

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        """`sqrt(N) (4 Phi + 1) / sqrt(k) (sum_h |W_Q,h|^4 |W_V,h|^2)^(1/2) |W_O|`, 2-norm."""
        query, value = (
            gram_upper_bound(ops.transpose(ops.convert_to_tensor(kernel), (1, 0, 2)))
            for kernel in (self.query_kernel, self.value_kernel)
        )
        inner = self.num_heads * self.value_dim
        output = gram_upper_bound(
            ops.reshape(ops.convert_to_tensor(self.output_kernel), (inner, -1))
        )
        assert sequence_length is not None
        head = published_head_bound(sequence_length)
        heads = ops.sqrt(ops.sum(query**4 * value**2))
        return head / math.sqrt(self.key_dim) * heads * output


def build(variant: str, size: Size, symbols: int) -> keras.Model:
    """A Transformer from characters `(B, context)` to logits `(B, context, symbols)`.

    Normalization comes after each residual connection, as in the paper. Tied attention has one
    projection less, hence wider heads for the same number of weights.

    Args:
        variant: One of `VARIANTS`.
        size: A `Size`.
        symbols: Number of different characters.

    Returns:
        A Functional model.
    """
    tokens = keras.Input((size.context,), dtype="int32")
    x = keras.layers.Embedding(symbols, size.width, name="embedding")(tokens)
    waves: Any = _waves
    x = PositionEmbedding(size.context, initializer=waves, name="position")(x)
    if variant == CERTIFIED:
        x = TokenProjection(math.sqrt(size.width), name="ball")(x)
    for index in range(size.layers):
        x = _attend(variant, size, index, x)
        if variant == CERTIFIED:
            x = _contractive_perceptron(size, index)(x)
            continue
        x = keras.layers.LayerNormalization(name=f"attention_norm_{index}")(x)
        y = keras.layers.Dense(4 * size.width, "relu", name=f"up_{index}")(x)
        y = keras.layers.Dense(size.width, name=f"down_{index}")(y)
        x = keras.layers.LayerNormalization(name=f"perceptron_norm_{index}")(x + y)
    return keras.Model(tokens, keras.layers.Dense(symbols, name="head")(x), name="char_lm")


def _attend(variant, size, index, x):
    """A residual connection around attention, `x + attention(x)`, or the contractive form."""
    name = f"attention_{index}"
    untied, tied = size.width // size.heads, 4 * size.width // (3 * size.heads)
    if variant == "dot_product":
        attention = keras.layers.MultiHeadAttention(size.heads, untied, name=name)
        return x + attention(x, x, use_causal_mask=True)
    if variant == "dot_product, relative":
        return x + RelativeAttention(size.heads, untied, name=name)(x)
    if variant == "l2_untied":
        return x + UntiedL2Attention(size.heads, untied, name=name)(x)
    if variant.startswith("l2"):
        reach = REACH if "relative" in variant else None
        attention = L2MultiHeadAttention(size.heads, tied, max_relative_position=reach, name=name)
        return x + attention(x, use_causal_mask=True)
    norm = "token" if variant == CERTIFIED else "l2"
    if variant in TIED:
        kind = PublishedBoundAttention if "published" in variant else L2MultiHeadAttention
        branch = kind(size.heads, tied, name=f"branch_{index}")
    else:
        branch = BoundedMultiHeadAttention(
            size.heads,
            untied,
            token_radius=math.sqrt(size.width),
            max_relative_position=REACH,
            kernel_initializer="orthogonal",
            name=f"branch_{index}",
        )
    if variant.startswith("contractive"):
        layer = InvertibleResidual(branch, COEFFICIENT, norm, use_causal_mask=True, name=name)
        x = layer(x)
    else:
        x = x + branch(x, use_causal_mask=True)
    if variant in BOUNDED:
        _look_at_one_distance_each(branch)
    return x


def _look_at_one_distance_each(attention):
    """Lets head `h` start with the token `h + 1` places to the left, and few scores of contents.

    The bound of such heads is small, and hence their part of a contractive residual is large.
    """
    heads, reach = attention.relative_bias.shape[0], attention.max_relative_position
    table = np.full(attention.relative_bias.shape, -START)
    for head in range(heads):
        table[head, reach + min(head, reach - 1)] = START
    attention.relative_bias.assign(table)
    attention.query_kernel.assign(QUERY_SCALE * attention.query_kernel)


def _contractive_perceptron(size, index):
    branch = keras.Sequential(
        [
            OrthogonalDense(4 * size.width, name=f"up_{index}"),
            MaxMin(name=f"sort_{index}"),
            OrthogonalDense(size.width, name=f"down_{index}"),
        ]
    )
    return InvertibleResidual(branch, COEFFICIENT, "token", name=f"perceptron_{index}")


def _waves(shape, dtype=None):
    """Sines and cosines of the position, the start of what is learned."""
    positions, width = shape
    rates = 10000.0 ** -(np.arange(width // 2) * 2.0 / width)
    angles = np.arange(positions)[:, None] * rates
    return ops.cast(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype or "float32")


def trainable_weights(model: keras.Model) -> int:
    """Number of weights that are learned; vectors which follow norms are not.

    Biases of later characters, which the causal mask hides, do not count.
    """
    count = sum(math.prod(weight.shape) for weight in model.trainable_variables)
    for layer in model.layers:
        table = getattr(getattr(layer, "branch", layer), "relative_bias", None)
        count -= 0 if table is None else math.prod(table.shape) // 2
    return count


def generate(model, prompt, length, *, temperature=1.0, seed=0):
    """Continues texts with one cached step a character.

    Args:
        model: A model of tied L2 attention, contractive or not.
        prompt: Integers `(B, P)`, `P >= 1`.
        length: Number of characters with the prompt, at most the context of the model.
        temperature: Divides the logits; 0 for the likeliest character.
        seed: Seed of the draws.

    Returns:
        A pair: integers `(B, length)`, and the logits `(B, length - 1, symbols)` they were drawn
        from, those of the prompt included.

    Raises:
        ValueError: If the text would be longer than the context, or the attention has no cache.
    """
    context = model.input_shape[1]
    if not 0 < prompt.shape[1] < length <= context:
        raise ValueError(
            f"The text must be longer than its prompt and have at most {context} characters. "
            f"Received: length={length} with a prompt of {prompt.shape[1]}"
        )
    blocks = [layer for layer in model.layers if layer.name.startswith("attention_")]
    blocks = [layer for layer in blocks if "norm" not in layer.name]
    attentions = [getattr(block, "branch", block) for block in blocks]
    if not all(isinstance(attention, L2MultiHeadAttention) for attention in attentions):
        raise ValueError(
            "Cached decoding needs L2MultiHeadAttention. "
            f"Received: {sorted({type(attention).__name__ for attention in attentions})}"
        )
    caches = [attention.init_cache(len(prompt), length) for attention in attentions]
    step = tf.function(lambda *arguments: _decode(model, blocks, *arguments), autograph=False)
    rng, text, logits = np.random.default_rng(seed), np.asarray(prompt, "int32"), []
    new, position = text, 0
    while text.shape[1] < length:
        found, caches = step(tf.constant(new), caches, tf.constant(position))
        logits.append(found.numpy())
        position += new.shape[1]
        new = _draw(logits[-1][:, -1], temperature, rng)[:, None]
        text = np.concatenate([text, new], axis=1)
    return text, np.concatenate(logits, axis=1)


def _decode(model, blocks, tokens, caches, position):
    """Logits of new characters, after those in the caches."""
    x = model.get_layer("embedding")(tokens)
    embedding = ops.convert_to_tensor(model.get_layer("position").embedding)
    x = x + ops.slice(embedding, (position, 0), (tokens.shape[1], x.shape[-1]))
    after = []
    for index, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        attention, scale = getattr(block, "branch", block), 1.0
        if isinstance(block, InvertibleResidual):
            scale = block.coefficient / attention.graph_bound(
                norm=block.norm, sequence_length=block.max_sequence_length, mask="causal"
            )
        y, cache = attention.decode(x, cache, position)
        after.append(cache)
        x = model.get_layer(f"attention_norm_{index}")(x + scale * y)
        y = model.get_layer(f"down_{index}")(model.get_layer(f"up_{index}")(x))
        x = model.get_layer(f"perceptron_norm_{index}")(x + y)
    return model.get_layer("head")(x), after


def _draw(logits, temperature, rng):
    if temperature > 0.0:
        # The largest of the logits plus Gumbel noise is a draw from their softmax.
        logits = logits / temperature + rng.gumbel(size=logits.shape)
    return np.argmax(logits, axis=-1).astype("int32")
