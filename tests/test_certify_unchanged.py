"""Certifying changes nothing: not the model, not the randomness, not a training in progress."""

from typing import Any

import keras
import numpy as np
import pytest
from helpers.certify_cases import snapshot
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.certification import certify


class Block(layers.Layer):
    """A layer without a rule, with layers, a loss, a state and a note inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, activation="relu")
        self.drop = layers.Dropout(0.5)
        self.seen = None

    def build(self, shape):
        self.dense.build(shape)
        self.scale = self.add_weight(name="scale", shape=(4,), initializer="ones")

    def call(self, x, training=None):
        y = self.drop(self.dense(x), training=training) * self.scale
        self.seen = y
        if training:
            self.add_loss(ops.mean(ops.square(y)))
        return x + y


class Subclassed(keras.Model):
    """A model without a graph."""

    def __init__(self):
        super().__init__()
        self.block = Block(name="block")
        self.head = layers.Dense(3, name="head", activity_regularizer="l2")

    def call(self, x, training=None):
        return self.head(self.block(x, training=training))


def functional():
    x = keras.Input((5, 4))
    y = kl.L2MultiHeadAttention(2, 2, spectral_norm=1.0)(x)
    y = kl.Residual(0.5, trainable_alpha=True)([x, y])
    y = layers.BatchNormalization()(Block(name="block")(y))
    y = kl.SpectralDense(4, kernel_regularizer="l2")(y)
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(layers.Dropout(0.3)(y))))


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 4), np.float32))
    return model


def sequential():
    return keras.Sequential([layers.Input((4,)), Block(), layers.LayerNormalization()])


MODELS = dict(functional=functional, subclassed=subclassed, sequential=sequential)
TRAINED = ("functional", "subclassed")


@pytest.mark.parametrize("name", MODELS)
def test_not_one_bit_of_the_model_changes(name):
    model: Any = MODELS[name]()
    model.compile("adam", "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    shape = (4, *(model.input_shape[1:] if name != "subclassed" else (4,)))
    x = rng.normal(size=shape).astype("float32")
    y = np.zeros(model(x).shape, np.float32)
    model.fit(x, y, epochs=1, verbose=0)
    # So that there are losses and updates under way.
    model(x, training=True)
    before = snapshot(model)
    for norm in ("l2", "token", "linf"):
        certificate = certify(model, norm=norm)
        assert certificate.is_finite, certificate.reasons
        after = snapshot(model)
        for key in before:
            assert before[key] == after[key], key


def test_names_made_up_later_are_those_of_a_run_without_certificates():
    model = subclassed()
    keras.backend.clear_session()
    certify(model)
    x: Any = keras.Input((2,))
    assert layers.Dense(2).name == "dense"
    assert x._keras_history.operation.name == "input_layer"
    assert (x * 2.0)._keras_history.operation.name == "multiply"


@pytest.mark.parametrize("name", TRAINED)
def test_training_with_certificates_is_training(name):
    class Certify(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.totals = []

        def on_train_batch_end(self, batch, logs=None):
            model: Any = self.model
            self.totals.append(certify(model).total)

        def on_epoch_end(self, epoch, logs=None):
            self.on_train_batch_end(epoch)

    weights = []
    for callbacks in ([], [Certify()]):
        keras.utils.set_random_seed(3)
        model: Any = MODELS[name]()
        model.compile("adam", "mse", jit_compile=False)
        shape = (8, *(model.input_shape[1:] if name != "subclassed" else (4,)))
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        y = np.ones(model(x).shape, np.float32)
        model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=callbacks)
        weights.append([w.tobytes() for w in model.get_weights()])
    assert weights[0] == weights[1]
    totals = callbacks[0].totals
    assert len(totals) == 6 and all(np.isfinite(totals)) and len(set(totals)) > 1
