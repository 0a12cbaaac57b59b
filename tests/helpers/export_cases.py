"""Small models to export, with all kinds of inputs and outputs."""

import contextlib
from typing import Any

import keras
import numpy as np
from helpers.serving_client import ServingClient
from keras import layers, ops

import keras_lipattn as lip
from keras_lipattn.export import verification

LENGTH = 6
WIDTH = 8


@contextlib.contextmanager
def one_serving_process():
    """Check all exports in one clean process instead of a new one for each."""
    client = ServingClient()
    original = verification.serve
    verification.serve = client.serve
    try:
        yield client
    finally:
        verification.serve = original
        client.close()


def attention(**options):
    options = {
        "spectral_norm": 2.0,
        "lipschitz_bound": 1.0,
        "max_sequence_length": LENGTH,
    } | options
    return lip.L2MultiHeadAttention(2, 4, **options)


def spectral_dense(units, capped, **options):
    cap: Any = 1.0 if capped else None
    return lip.SpectralDense(units, spectral_norm=cap, **options)


def block(x, attend=None, **call):
    """A pre-normalized residual block of attention."""
    attend = attend or attention()
    return lip.Residual(alpha=0.5)([x, attend(lip.CenterNormalization()(x), **call)])


def randomized(model, scale=1.5):
    """The model with weights so large that the caps are active."""
    rng = np.random.default_rng(7)
    for variable in model.trainable_variables:
        noise = rng.normal(size=variable.shape) / np.sqrt(max(1, variable.shape[0]))
        variable.assign(scale * noise)
    return model


def classifier(capped=True) -> Any:
    """A softmax over tokens of any length."""
    caps: dict[str, Any] = {} if capped else {"spectral_norm": None, "lipschitz_bound": None}
    inputs = keras.Input((None, WIDTH), name="tokens")
    x = spectral_dense(WIDTH, capped)(inputs)
    x = block(x, attention(**caps))
    x = layers.GlobalAveragePooling1D()(x)
    return randomized(keras.Model(inputs, layers.Dense(3, activation="softmax")(x)))


def ids_classifier():
    """A sigmoid over integers that are padded with 0."""
    inputs = keras.Input((None,), dtype="int32", name="ids")
    x = block(layers.Embedding(11, WIDTH, mask_zero=True)(inputs))
    x = layers.GlobalAveragePooling1D()(x)
    return randomized(keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x)))


def masked_classifier():
    """A model with a dict of tokens and their mask as input."""
    tokens = keras.Input((None, WIDTH), name="tokens")
    valid = keras.Input((None,), dtype="bool", name="valid")
    x = layers.GlobalMaxPooling1D()(block(tokens, query_mask=valid))
    inputs = {"tokens": tokens, "valid": valid}
    return randomized(keras.Model(inputs, spectral_dense(4, False)(x)))


def tagger():
    """A model with a dict of outputs, one of them a label for each token."""
    inputs = keras.Input((None, WIDTH))
    x = block(inputs, attention(max_relative_position=3), use_causal_mask=True)
    return randomized(
        keras.Model(
            inputs, {"tags": layers.Dense(3)(x), "mean": layers.GlobalAveragePooling1D()(x)}
        )
    )


def dense(end, width=4):
    """A small dense model that ends in `end`."""
    inputs = keras.Input((width,), name="x")
    return randomized(keras.Model(inputs, end(layers.Dense(5, activation="relu")(inputs))))


# Outputs with the same logits, by name.
ENDINGS = {
    "linear": lambda x: layers.Dense(3)(x),
    "dense softmax": lambda x: layers.Dense(3, activation="softmax")(x),
    "spectral softmax": lambda x: spectral_dense(3, False, activation="softmax")(x),
    "log softmax": lambda x: layers.Dense(3, activation="log_softmax")(x),
    "softmax layer": lambda x: layers.Softmax()(layers.Dense(3)(x)),
    "activation layer": lambda x: layers.Activation("softmax")(layers.Dense(3)(x)),
    "operation": lambda x: ops.softmax(layers.Dense(3)(x)),
    "nested": lambda x: keras.Sequential(
        [keras.Input((5,)), layers.Dense(3, activation="softmax")]
    )(x),
}


@keras.saving.register_keras_serializable(package="export_cases")
class Subclassed(keras.Model):
    """A subclassed model."""

    def __init__(self, by_operation=False, **kwargs):
        super().__init__(**kwargs)
        self.by_operation = by_operation
        self.attention = attention()
        self.pooling = layers.GlobalAveragePooling1D()
        self.head = layers.Dense(3, activation=None if by_operation else "softmax")

    def call(self, tokens):
        logits = self.head(self.pooling(self.attention(tokens)))
        return ops.softmax(logits) if self.by_operation else logits

    def get_config(self):
        return {**super().get_config(), "by_operation": self.by_operation}


def subclassed(by_operation=False):
    model = Subclassed(by_operation)
    model(np.zeros((1, LENGTH, WIDTH), np.float32))
    return randomized(model)


def tokens(batch=4, length=LENGTH, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)
