"""Models which hold dot-product attention in every way that Keras code does."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false

import keras
from keras import layers, ops

import keras_lipattn as kl

TOKENS, FEATURES, WORDS = 5, 8, 11

register = keras.saving.register_keras_serializable("attention_blocks")


def attention(**kwargs):
    return layers.MultiHeadAttention(2, 4, **kwargs)


@register
class MadeInBuild(layers.Layer):
    """The pattern of encoders in libraries: every layer is made and built in `build`."""

    def __init__(self, units=16, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.supports_masking = True

    def build(self, inputs_shape):
        features = inputs_shape[-1]
        self._attention_layer = attention(dtype=self.dtype_policy, name="attention_layer")
        self._attention_layer.build(query_shape=inputs_shape, value_shape=inputs_shape)
        self._norm = kl.CenterNormalization(dtype=self.dtype_policy, name="norm")
        self._norm.build(inputs_shape)
        self._inner = layers.Dense(self.units, "relu", dtype=self.dtype_policy, name="inner")
        self._inner.build(inputs_shape)
        self._outer = layers.Dense(features, dtype=self.dtype_policy, name="outer")
        self._outer.build((*inputs_shape[:-1], self.units))
        self.built = True

    def call(self, inputs, attention_mask=None, training=None):
        x = self._attention_layer(
            query=inputs, value=inputs, attention_mask=attention_mask, training=training
        )
        x = self._norm(inputs + x)
        return x + self._outer(self._inner(x))

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@register
class InCollections(layers.Layer):
    """Layers in a list, a dictionary and a tuple, made in `__init__`, and no `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = [attention(name="first"), layers.Dense(FEATURES)]
        self.named = {"attention": attention(name="second"), "scale": 0.5}
        self.pair = (attention(name="third"), layers.Dense(FEATURES))

    def call(self, inputs):
        x = inputs
        for mix, dense in (self.steps, self.pair):
            x = x + dense(mix(x, x))
        return x + self.named["scale"] * self.named["attention"](x, x, key=x)


@register
class Holder(layers.Layer):
    """A custom layer around others."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = MadeInBuild(name="block")
        self.rest = InCollections(name="rest")

    def call(self, inputs, training=None):
        return self.rest(self.block(inputs, training=training))


@register
class OneForTwo(keras.Model):
    """Two blocks share one attention layer, another is used alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shared = attention(name="shared")
        self.blocks = [Around(self.shared, name=f"block_{index}") for index in range(2)]
        self.own = attention(name="own")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs, training=None):
        x = inputs
        for block in self.blocks:
            x = block(x)
        return self.head(ops.mean(x + self.own(x, x), axis=1))


@register
class Around(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.dense = layers.Dense(FEATURES)

    def call(self, inputs):
        return inputs + self.dense(self.inner(inputs, inputs))

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        inner = keras.saving.deserialize_keras_object(config.pop("inner"))
        return cls(inner, **config)


@register
class Subclassed(keras.Model):
    """A subclassed model with blocks, a Functional and a Sequential model inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inputs = keras.Input((TOKENS, FEATURES))
        self.graph = keras.Model(inputs, attention(name="deep")(inputs, inputs), name="graph")
        self.stack = keras.Sequential(
            [MadeInBuild(name="in_stack"), layers.Dense(FEATURES)], name="sequential"
        )
        self.head = layers.Dense(3, name="head")

    def call(self, inputs, training=None):
        return self.head(ops.mean(self.stack(self.graph(inputs)), axis=1))


@register
class Backbone(keras.Model):
    """A Functional model that makes its graph from a few numbers, as models of libraries do."""

    def __init__(self, depth=2, **kwargs):
        inputs = keras.Input((TOKENS, FEATURES), name="tokens")
        x = inputs
        for index in range(depth):
            x = MadeInBuild(name=f"layer_{index}")(x)
        x = layers.Add(name="sum")([x, attention(name="last")(x, x)])
        super().__init__(inputs=inputs, outputs=x, **kwargs)
        self.depth = depth

    def get_config(self):
        return {"name": self.name, "trainable": self.trainable, "depth": self.depth}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _ending(x):
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling1D(name="mean")(x))


def around(make):
    """A Functional model with one layer in the middle."""
    inputs = keras.Input((TOKENS, FEATURES))
    return keras.Model(inputs, _ending(make(inputs)))


def nested():
    """Custom blocks in a Sequential model in a Functional one, used twice."""
    inputs = keras.Input((TOKENS, FEATURES))
    stack = keras.Sequential(
        [keras.Input((TOKENS, FEATURES)), MadeInBuild(name="inside")], name="stack"
    )
    tokens = keras.Input((TOKENS, FEATURES))
    inner = keras.Model(tokens, stack(InCollections(name="rest")(tokens)), name="inner")
    return keras.Model(inputs, _ending(inner(inner(inputs))))


def in_graph(kind):
    def make():
        model = kind(name="made")
        model(ops.zeros((1, TOKENS, FEATURES)))
        return model

    return make


REST = ("rest/first", "rest/second", "rest/third")
# From the name of a kind to a function that makes the model, and the paths of its attention.
KINDS = {
    "made in build": (
        lambda: around(MadeInBuild(name="block")),
        ("block/attention_layer",),
    ),
    "holder": (
        lambda: around(Holder(name="holder")),
        ("holder/block/attention_layer", *(f"holder/{path}" for path in REST)),
    ),
    "nested": (
        nested,
        (*(f"inner/{path}" for path in REST), "inner/stack/inside/attention_layer"),
    ),
    "backbone": (
        lambda: around(Backbone(name="backbone")),
        (
            "backbone/layer_0/attention_layer",
            "backbone/layer_1/attention_layer",
            "backbone/last",
        ),
    ),
    "backbone alone": (
        Backbone,
        ("layer_0/attention_layer", "layer_1/attention_layer", "last"),
    ),
    "subclassed": (
        in_graph(Subclassed),
        ("graph/deep", "sequential/in_stack/attention_layer"),
    ),
    "shared": (in_graph(OneForTwo), ("shared", "own")),
}
