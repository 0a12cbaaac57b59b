"""`make_lipschitz(logits=True)` leaves out the softmax or sigmoid at the end, and nothing else."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import keras
import numpy as np
import pytest
from helpers.ordinary_models import CLASSES, FEATURES, TOKENS, AddsItself, batch, register
from keras import layers, ops
from keras.src.ops.nn import Softmax

import keras_lipattn as kl

# Keras warns when it loads layers without `build`, whose state it makes in their first call.
pytestmark = pytest.mark.filterwarnings("ignore:.*`?build:UserWarning")


# Ends of models on tokens `(batch, TOKENS, FEATURES)`, and the activation that they end in.
HEADS = {
    "dense": (lambda x: layers.Dense(CLASSES, "softmax")(x), "softmax"),
    "function": (lambda x: layers.Dense(CLASSES, keras.activations.softmax)(x), "softmax"),
    "log": (lambda x: layers.Dense(CLASSES, "log_softmax")(x), "log_softmax"),
    "sigmoid": (lambda x: layers.Dense(1, "sigmoid")(x), "sigmoid"),
    "labels": (lambda x: layers.Dense(CLASSES, "sigmoid")(x), "sigmoid"),
    "activation": (lambda x: layers.Activation("softmax")(layers.Dense(CLASSES)(x)), "softmax"),
    "layer": (lambda x: layers.Softmax()(layers.Dense(CLASSES)(x)), "softmax"),
    "operation": (lambda x: ops.softmax(layers.Dense(CLASSES)(x)), "softmax"),
    "log_operation": (lambda x: ops.log_softmax(layers.Dense(CLASSES)(x)), "log_softmax"),
    "sigmoid_operation": (lambda x: ops.sigmoid(layers.Dense(1)(x)), "sigmoid"),
    "keywords": (lambda x: ops.softmax(x=layers.Dense(CLASSES)(x), axis=-1), "softmax"),
    "own_layer": (lambda x: kl.OrthogonalDense(CLASSES, activation="softmax")(x), "softmax"),
    "capped": (lambda x: kl.SpectralDense(CLASSES, activation="softmax")(x), "softmax"),
    "einsum": (
        lambda x: layers.EinsumDense("...x,xy->...y", (CLASSES,), activation="softmax")(x),
        "softmax",
    ),
    "inner": (
        lambda x: keras.Sequential([layers.Dense(4, "relu"), layers.Dense(CLASSES, "softmax")])(x),
        "softmax",
    ),
}
TOKEN_HEADS = {
    "times": (
        lambda x: layers.TimeDistributed(layers.Dense(CLASSES, activation="softmax"))(x),
        "softmax",
    ),
    "convolution": (lambda x: layers.Conv1D(CLASSES, 1, activation="softmax")(x), "softmax"),
    "strided": (lambda x: layers.Conv1D(CLASSES, 2, 2, activation="softmax")(x), "softmax"),
}


def with_head(name, pooled):
    heads = HEADS if pooled else HEADS | TOKEN_HEADS
    keras.utils.set_random_seed(3)
    inputs = keras.Input((TOKENS, FEATURES))
    x = layers.Dense(FEATURES, "relu")(inputs)
    x = layers.GlobalAveragePooling1D()(x) if pooled else x
    head, activation = heads[name]
    return keras.Model(inputs, head(x)), getattr(keras.activations, activation)


@pytest.mark.parametrize(
    "name, pooled",
    [(name, True) for name in HEADS] + [(name, False) for name in (*HEADS, *TOKEN_HEADS)],
)
def test_the_activation_at_the_end_is_left_out_only_for_logits(name, pooled, tmp_path):
    model, activation = with_head(name, pooled)
    x = batch(model)
    kept, result = kl.make_lipschitz(model), kl.make_lipschitz(model, logits=True)
    logits = result.model.predict(x, verbose=0)
    probabilities = kept.model.predict(x, verbose=0)
    assert logits.shape == probabilities.shape
    np.testing.assert_allclose(activation(logits), probabilities, rtol=0, atol=1e-5)
    # It is not the activation of the activation.
    assert np.abs(logits - probabilities).max() > 1e-3
    advised = "pass `logits=True`" in str(kept)
    assert advised == (activation is keras.activations.softmax)
    assert "logits" not in "".join(result.advice)
    changes = [text for text in result.replaced.values() if "without its" in text]
    identities = [text for text in result.replaced.values() if text.endswith("-> Identity")]
    assert len(changes + identities) == 1
    result.model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), logits)
    if logits.shape[-1] > 1:
        # The losses of this package refuse probabilities.
        loaded.compile("sgd", kl.losses.MarginCrossentropy(radius=0.1), jit_compile=False)
        loaded.fit(x, np.zeros(logits.shape[:-1], "int32"), verbose=0)


def test_logits_of_a_subclassed_model(tmp_path):
    model = AddsItself(name="whole")
    x = np.random.default_rng(1).random((4, FEATURES)).astype("float32")
    model(x)
    result = kl.make_lipschitz(model, logits=True)
    assert result.replaced["head"] == "Dense -> OrthogonalDense, without its softmax"
    logits = result.model.predict(x, verbose=0)
    probabilities = kl.make_lipschitz(model).model.predict(x, verbose=0)
    np.testing.assert_allclose(keras.activations.softmax(logits), probabilities, atol=1e-6)
    result.model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), logits)


@register
class EndsInCode(layers.Layer):
    def call(self, x):
        return ops.softmax(x)


def _used_twice(x):
    gate = layers.Dense(FEATURES, "softmax", name="head")(x)
    return [gate, layers.Dense(CLASSES)(layers.Multiply()([x, gate]))]


def _used_before_and_after_a_reshape(x):
    gate = layers.Dense(FEATURES, "softmax", name="head")(x)
    return [ops.reshape(gate, (-1, 1, FEATURES)), layers.Multiply()([x, gate])]


def _used_after_a_reshape(x):
    gate = layers.Dense(FEATURES, "softmax", name="head")(x)
    row = ops.reshape(gate, (-1, 1, FEATURES))
    return [row, layers.Dense(CLASSES)(row)]


# Ends whose softmax stays, with arguments of the conversion, and whether the model ends in it.
STAYING = {
    "in code": (lambda x: EndsInCode(name="head")(layers.Dense(CLASSES)(x)), {}),
    "used before a reshape": (_used_before_and_after_a_reshape, {}),
    "named": (lambda x: layers.Dense(CLASSES, "softmax", name="head")(x), {"keep": "head"}),
    "operation named": (
        lambda x: Softmax(name="head")(layers.Dense(CLASSES)(x)),
        {"keep": ["head"]},
    ),
    "used in the model": (_used_twice, {}),
    "no dense layer": (
        lambda x: layers.EinsumDense("bx,xyz->byz", (2, CLASSES), "softmax", name="head")(x),
        {},
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_a_softmax_that_cannot_be_left_out_is_reported(name):
    head, options = STAYING[name]
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, head(layers.Dense(FEATURES, "tanh")(inputs)))
    model.compile("sgd", "mse")
    result = kl.make_lipschitz(model, logits=True, **options)
    (line,) = (line for line in result.advice if "softmax" in line)
    assert "`head" in line and "build the model without it" in line
    first = keras.tree.flatten(result.model(np.ones((1, FEATURES), "float32")))[0]
    np.testing.assert_allclose(np.array(first).sum(-1), 1.0, rtol=1e-5)
    # Nothing was left out, so the loss of the original is still right.
    assert result.model.compiled


def test_a_softmax_that_is_used_after_a_reshape_stays():
    inputs = keras.Input((FEATURES,))
    result = kl.make_lipschitz(keras.Model(inputs, _used_after_a_reshape(inputs)), logits=True)
    gate = result.model(np.ones((1, FEATURES), "float32"))[0]
    np.testing.assert_allclose(np.array(gate).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_the_activation_of_a_last_layer_for_every_token_stays(activation):
    inputs = keras.Input((TOKENS, FEATURES))
    last = layers.TimeDistributed(layers.Dense(4, activation))
    model = kl.make_lipschitz(keras.Model(inputs, last(inputs))).model
    assert model.layers[-1].activation is getattr(keras.activations, activation)


def test_only_the_class_axis_is_a_softmax_at_the_end():
    inputs = keras.Input((TOKENS, FEATURES))
    for head in (layers.Softmax(axis=1), lambda x: ops.softmax(x, axis=1)):
        result = kl.make_lipschitz(keras.Model(inputs, head(inputs)), logits=True)
        assert result.replaced == {} and "no softmax" in str(result)


def test_a_model_without_its_softmax_is_not_compiled():
    model, _ = with_head("dense", True)
    assert kl.make_lipschitz(model, logits=True).advice == ()
    model.compile("adam", "sparse_categorical_crossentropy")
    assert kl.make_lipschitz(model).model.compiled
    result = kl.make_lipschitz(model, logits=True)
    assert not result.model.compiled and "not compiled" in str(result)


def test_half_precision_is_kept_without_the_softmax():
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(CLASSES, dtype="mixed_bfloat16")(inputs)
    for head, dtype in (
        (layers.Activation("softmax", dtype="float32"), "float32"),
        (layers.Softmax(dtype="mixed_bfloat16"), "bfloat16"),
        (ops.softmax, "bfloat16"),
    ):
        result = kl.make_lipschitz(keras.Model(inputs, head(x)), logits=True)
        assert result.model.output.dtype == dtype


def test_the_report_says_that_the_loss_gets_a_mask():
    words = keras.Input((TOKENS,), dtype="int32")
    for mask_zero in (False, True):
        x = layers.Embedding(9, FEATURES, mask_zero=mask_zero)(words)
        model = keras.Model(words, ops.softmax(layers.Dense(CLASSES)(x)))
        result = kl.make_lipschitz(model, logits=True)
        assert ("the loss leaves the padding out" in str(result)) == mask_zero
        assert hasattr(result.model.output, "_keras_mask") == mask_zero
