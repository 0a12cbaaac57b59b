"""Small models of every kind for tests of the monitor, and data for them."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_lipattn as kl

TOKENS, FEATURES, CLASSES = 5, 6, 3


def attention(**kwargs):
    return kl.L2MultiHeadAttention(2, 4, **{"name": "attention", **kwargs})


def dense(units=FEATURES, **kwargs):
    return kl.SpectralDense(units, **{"name": "dense", "spectral_norm": None, **kwargs})


def sequential():
    """The smallest one, quick to trace."""
    return keras.Sequential(
        [
            keras.Input((TOKENS, FEATURES)),
            dense(),
            keras.layers.GlobalAveragePooling1D(),
            dense(CLASSES, name="head"),
        ],
        name="sequential",
    )


def functional():
    inputs = keras.Input((TOKENS, FEATURES))
    x = kl.Residual(name="sum")([inputs, attention()(inputs)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, dense(CLASSES, name="head")(x), name="functional")


def capped():
    """Caps on both layers, and a residual with a weight to read on the host."""
    inputs = keras.Input((TOKENS, FEATURES))
    x = attention(spectral_norm=1.0, lipschitz_bound=0.5)(inputs)
    x = kl.Residual(0.3, trainable_alpha=True, name="sum")([inputs, x])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, dense(CLASSES, spectral_norm=0.7, name="head")(x), name="capped")


def _encoder(name):
    # Built alone, so that Keras gives the layers of both encoders the same path.
    inputs = keras.Input((TOKENS, FEATURES))
    return keras.Model(inputs, dense()(inputs), name=name)


def nested():
    inputs = keras.Input((TOKENS, FEATURES))
    x = _encoder("encoder-b")(_encoder("encoder.a")(inputs))
    # Its name equals the key of the layer in the first encoder.
    x = dense(name="encoder_a_dense")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, dense(CLASSES, name="total")(x), name="nested")


def shared():
    inputs = keras.Input((TOKENS, FEATURES))
    layer = attention()
    x = layer(layer(inputs), use_causal_mask=True)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, dense(CLASSES, name="head")(x), name="shared")


class Subclassed(keras.Model):
    """Gets its weights in its first call."""

    def __init__(self, *names):
        super().__init__(name="subclassed")
        self.blocks = [dense(name=name) for name in names]
        self.head = dense(CLASSES, name="head")

    def call(self, inputs, training=None):
        x = inputs
        for block in self.blocks:
            x = x + block(x, training=training)
        return self.head(ops.mean(x, axis=1), training=training)


def subclassed():
    return Subclassed("first", "second")


KINDS: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (sequential, functional, nested, shared, subclassed)
}


def compiled(model: Any, *, learning_rate=0.01, loss: Any = None, **kwargs: Any) -> Any:
    """`model`, compiled with options that keep tests short, unless `kwargs` override them."""
    model.compile(
        keras.optimizers.SGD(learning_rate),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **{"jit_compile": False, **kwargs},
    )
    return model


def without_loss(targets, outputs):
    """A loss that is always zero, so that only the penalty trains."""
    return ops.mean(ops.multiply(outputs, 0.0), axis=-1)


def data(examples=8):
    random = np.random.default_rng(7)
    x = random.standard_normal((examples, TOKENS, FEATURES)).astype("float32")
    return x, random.integers(0, CLASSES, examples)


def weights(model):
    """The trainable weights of `model` as one vector."""
    return np.concatenate([np.ravel(variable.numpy()) for variable in model.trainable_variables])


def fit(model: Any, *callbacks, **kwargs: Any) -> dict[str, list[float]]:
    """The history of a silent `fit` on `data()`, in order."""
    options = {"batch_size": 4, "verbose": 0, "shuffle": False, **kwargs}
    return model.fit(*data(), **options, callbacks=list(callbacks)).history
