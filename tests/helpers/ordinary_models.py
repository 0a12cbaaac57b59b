"""Ordinary Keras models of every kind, for conversion to Lipschitz layers, and inputs for them."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

TOKENS, FEATURES, WORDS, CLASSES = 6, 8, 12, 3
register = keras.saving.register_keras_serializable("ordinary_models")


@register
class Block(layers.Layer):
    """The block of the public Keras examples: sums in its own code, normalizations after them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.att = layers.MultiHeadAttention(2, 4, name="att")
        self.ffn = keras.Sequential(
            [layers.Dense(16, activation="gelu", name="wide"), layers.Dense(FEATURES, name="back")],
            name="ffn",
        )
        self.norms = [layers.LayerNormalization(name=f"norm{index}") for index in range(2)]
        self.drop = layers.Dropout(0.1)

    def call(self, inputs, training=None):
        attended = self.drop(self.att(inputs, inputs), training=training)
        x = self.norms[0](inputs + attended)
        return self.norms[1](x + self.drop(self.ffn(x), training=training))


@register
class WithAdds(layers.Layer):
    """Sums as layers, one of them used twice, and layers that are made in `build`."""

    def build(self, input_shape):
        features = input_shape[-1]
        self.add = layers.Add(name="sum")
        self.first = layers.EinsumDense("abc,cd->abd", (None, features), "relu", "d", name="first")
        self.second = layers.Dense(features, activation="silu", name="second")
        for layer in (self.first, self.second):
            layer.build(input_shape)

    def call(self, x):
        x = self.add([x, self.first(x)])
        return self.add([x, self.second(x)])


def _head(x):
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    return layers.Dense(CLASSES, activation="softmax", name="logits")(x)


def _pre_norm_block(x, index):
    y = layers.LayerNormalization(name=f"norm_a{index}")(x)
    y = layers.MultiHeadAttention(2, 4, dropout=0.1, name=f"attention{index}")(y, y)
    # The branch comes first, as in many examples.
    x = layers.Add(name=f"add{index}")([y, x])
    y = layers.RMSNormalization(name=f"norm_b{index}")(x)
    y = layers.Dense(16, name=f"wide{index}")(y)
    y = layers.Activation("gelu", name=f"gelu{index}")(y)
    return x + layers.Dense(FEATURES, name=f"back{index}")(y)


def vision_transformer():
    image = keras.Input((12, 8, 3), name="image")
    x = layers.Conv2D(FEATURES, 4, strides=4, name="patches")(image)
    x = layers.Reshape((TOKENS, FEATURES))(x)
    positions = layers.Embedding(TOKENS, FEATURES, name="positions")(ops.arange(TOKENS))
    x = x + positions
    for index in range(2):
        x = _pre_norm_block(x, index)
    x = layers.LayerNormalization(name="last_norm")(x)
    return keras.Model(image, _head(x), name="vision_transformer")


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2), name="pixels"),
            layers.Conv2D(4, 3, padding="same", use_bias=False, name="first"),
            layers.BatchNormalization(name="statistics"),
            layers.ReLU(name="relu"),
            layers.MaxPooling2D(3, strides=2, padding="same", name="pool"),
            layers.Conv2D(6, 3, strides=2, activation="swish", name="second"),
            layers.Conv2D(5, 1, activation="elu", name="pointwise"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(7, activation="relu", name="odd"),
            layers.Dense(CLASSES, name="logits"),
        ],
        name="convolutional",
    )


def text_classifier():
    ids = keras.Input((TOKENS,), dtype="int32", name="ids")
    x = layers.Embedding(WORDS, FEATURES, mask_zero=True, name="embedding")(ids)
    x = Block(name="block")(x)
    return keras.Model(ids, _head(x), name="text_classifier")


def nested():
    """An inner model that is used twice, with a Sequential model in it."""
    tokens = keras.Input((TOKENS, FEATURES))
    stack = keras.Sequential(
        [layers.Dense(FEATURES, "relu", name="inside"), Block(name="block")], name="stack"
    )
    inner = keras.Model(tokens, tokens + stack(tokens), name="inner")
    inputs = keras.Input((TOKENS, FEATURES), name="tokens")
    return keras.Model(inputs, _head(WithAdds(name="adds")(inner(inner(inputs)))), name="nested")


def shared():
    """A dense layer on tensors of two ranks, another on two lengths."""
    inputs = keras.Input((TOKENS, FEATURES), name="tokens")
    ranks = layers.Dense(FEATURES, "relu", name="ranks")
    lengths = layers.Dense(FEATURES, "relu", name="lengths")
    x = ranks(inputs)
    x = layers.Concatenate(axis=1)([lengths(x), lengths(x[:, :2])])
    x = ranks(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="shared")


def encoder_decoder():
    """Two inputs and outputs, cross-attention, and a layer for every token."""
    source = keras.Input((4, FEATURES), name="source")
    target = keras.Input((TOKENS, FEATURES), name="target")
    memory = layers.TimeDistributed(layers.Dense(FEATURES, "relu", name="each"), name="times")(
        source
    )
    x = layers.MultiHeadAttention(2, 4, name="causal")(target, target, use_causal_mask=True)
    x = layers.add([target, x])
    y = layers.MultiHeadAttention(2, 4, name="cross")(x, memory)
    x = layers.Add(name="three")([x, y, layers.Dense(FEATURES, name="third")(x)])
    outputs = {"logits": layers.Dense(CLASSES, name="logits")(x), "memory": memory}
    return keras.Model([source, target], outputs, name="encoder_decoder")


def dynamic():
    inputs = keras.Input((None, FEATURES), name="tokens")
    x = _pre_norm_block(inputs, 0)
    return keras.Model(inputs, _head(Block(name="block")(x)), name="dynamic")


def conv1d():
    inputs = keras.Input((TOKENS, 3), name="series")
    x = layers.Conv1D(FEATURES, 2, strides=2, activation="relu", name="patches")(inputs)
    x = layers.Conv1D(FEATURES, 1, activation="relu", name="pointwise")(x)
    return keras.Model(inputs, _head(layers.PReLU(name="prelu")(x)), name="conv1d")


@register
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(name="one"), Block(name="two")]
        self.scale = layers.Dense(FEATURES, name="scale")
        self.head = layers.Dense(CLASSES, name="head")

    def call(self, inputs):
        x = self.scale(inputs)
        for block in self.blocks:
            x = block(x)
        return self.head(ops.mean(x, axis=1))


@register
class AddsItself(keras.Model):
    """A model with a sum in its own code, which ends in a softmax."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.branch = layers.Dense(FEATURES, name="branch")
        self.head = layers.Dense(CLASSES, "softmax", name="head")

    def call(self, x):
        return self.head(x + self.branch(x))


def subclassed():
    model = Subclassed(name="subclassed")
    model(ops.zeros((1, TOKENS, FEATURES)))
    return model


KINDS: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        vision_transformer,
        convolutional,
        text_classifier,
        nested,
        shared,
        encoder_decoder,
        dynamic,
        conv1d,
        subclassed,
    )
}


def batch(model: Any, size: int = 4, seed: int = 0) -> Any:
    """Inputs of a model, in the structure of its call; padding at the end of integers."""
    random = np.random.default_rng(seed)
    if isinstance(model, Subclassed):
        return random.standard_normal((size, TOKENS, FEATURES)).astype("float32")

    def leaf(tensor):
        shape = (size, *(TOKENS if side is None else side for side in tensor.shape[1:]))
        if tensor.dtype == "int32":
            return random.integers(1, WORDS, shape) * (np.arange(shape[1]) < shape[1] - 2)
        return random.standard_normal(shape).astype("float32")

    inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
    return keras.tree.map_structure(leaf, inputs)


def outputs_of(model: Any, x: Any) -> list[np.ndarray]:
    """The outputs at inference, flat."""
    outputs = model(x, training=False)
    return [ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(outputs)]
