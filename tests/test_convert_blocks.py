"""Conversion reaches attention inside of custom layers and of models of every kind."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false
# pyright: reportOperatorIssue=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import attention_blocks
from helpers.attention_blocks import FEATURES, KINDS, TOKENS, OneForTwo, around
from keras import layers

import keras_lipattn as kl

# Keras warns when it loads layers without `build`, whose state it makes in their first call.
pytestmark = pytest.mark.filterwarnings("ignore:`build")


def batch(size=8):
    random = np.random.default_rng(5)
    return random.standard_normal((size, TOKENS, FEATURES)).astype("float32")


def made(kind):
    model = KINDS[kind][0]()
    random = np.random.default_rng(7)
    for weight in model.weights:
        # Biases and the like away from where they start.
        weight.assign(np.array(weight) + 0.05 * random.standard_normal(weight.shape))
    return model


def attention_of(model):
    kinds = (layers.MultiHeadAttention, kl.L2MultiHeadAttention)
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


def others(model):
    """Layers outside of attention."""
    inside = {id(inner) for layer in attention_of(model) for inner in layer._flatten_layers()}
    return [layer for layer in model._flatten_layers() if id(layer) not in inside]


@pytest.mark.parametrize("kind", KINDS)
def test_all_attention_is_found_and_replaced(kind):
    conversion = kl.convert_attention(made(kind), batch())
    assert conversion.replaced == KINDS[kind][1]
    assert conversion.kept == {}
    assert {type(layer) for layer in attention_of(conversion.model)} == {kl.L2MultiHeadAttention}
    assert len(attention_of(conversion.model)) == len(conversion.replaced)
    assert 0.0 < conversion.relative_error < 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_is_copied_bit_for_bit(kind):
    old = made(kind)
    new = kl.convert_attention(old).model
    assert isinstance(new, type(old))
    for before, after in zip(others(old), others(new), strict=True):
        assert before is not after and isinstance(after, type(before))
        for a, b in zip(before._trainable_variables, after._trainable_variables, strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_unchanged_and_the_copy_trains(kind):
    old = made(kind)
    x = batch()
    output, weights = np.array(old(x)), old.get_weights()
    new = kl.convert_attention(old, x).model
    new.compile(keras.optimizers.Adam(0.001), "mse", jit_compile=False)
    before = [np.array(layer.query_kernel) for layer in attention_of(new)]
    losses = new.fit(x, output, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for layer, kernel in zip(attention_of(new), before, strict=True):
        assert np.abs(np.array(layer.query_kernel) - kernel).max() > 0.0
    np.testing.assert_array_equal(np.array(old(x)), output)
    for a, b in zip(old.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {type(layer) for layer in attention_of(old)} == {layers.MultiHeadAttention}


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_saved_and_loaded(kind, tmp_path):
    new = kl.convert_attention(made(kind)).model
    new.compile(keras.optimizers.Adam(0.001), "mse", jit_compile=False)
    x = batch()
    # Slots of the optimizer are of the new weights.
    new.fit(x, np.zeros_like(np.array(new(x))), verbose=0)
    new.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.array(again(x)), np.array(new(x)))
    assert len(again.optimizer.variables) == len(new.optimizer.variables)
    again.save(tmp_path / "again.keras")
    once_more = keras.saving.load_model(tmp_path / "again.keras")
    np.testing.assert_array_equal(np.array(once_more(x)), np.array(new(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_certified(kind):
    old = made(kind)
    assert not kl.certify(old).is_finite
    certificate = kl.certify(kl.convert_attention(old).model)
    assert certificate.is_finite, certificate.reasons


@pytest.mark.parametrize("kind", ["made in build", "subclassed"])
def test_the_copy_is_exported_with_its_new_weights(kind, tmp_path):
    new = kl.convert_attention(made(kind)).model
    new.export(tmp_path / "served", verbose=False)
    x = batch()
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    # Float32, computed in another order.
    np.testing.assert_allclose(np.array(loaded.serve(x)), np.array(new(x)), rtol=1e-5, atol=1e-5)


def test_a_layer_of_two_blocks_stays_one_layer(tmp_path):
    new = kl.convert_attention(made("shared")).model
    assert isinstance(new, OneForTwo)
    assert new.blocks[0].inner is new.blocks[1].inner is new.shared
    new.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.blocks[0].inner is again.blocks[1].inner is again.shared


def test_changes_of_the_new_attention_are_saved(tmp_path):
    new = kl.convert_attention(made("made in build")).model
    block = new.get_layer("block")
    block._attention_layer.dropout = 0.25
    new.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("block")._attention_layer.dropout == 0.25


def test_a_converted_model_is_converted_again_without_change():
    new = kl.convert_attention(made("holder")).model
    again = kl.convert_attention(new, batch())
    assert again.replaced == () and again.relative_error == 0.0


def test_masks_reach_the_new_attention():
    inputs = keras.Input((TOKENS, FEATURES))
    mask = keras.Input((TOKENS, TOKENS), dtype="bool")
    x = attention_blocks.MadeInBuild(name="block")(inputs, attention_mask=mask)
    new = kl.convert_attention(keras.Model([inputs, mask], x)).model
    x, eye = batch(), np.eye(TOKENS, dtype=bool)[None].repeat(8, 0)
    changed = x.copy()
    changed[:, 3:] += 1.0
    np.testing.assert_array_equal(
        np.array(new([x, eye]))[:, :3], np.array(new([changed, eye]))[:, :3]
    )
    assert np.abs(np.array(new([x, eye])) - np.array(new([x, ~eye]))).max() > 1e-3


class Mixed(layers.Layer):
    """Attention of every kind that cannot be replaced, and one that can."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.self_attention = attention_blocks.attention(name="itself")
        self.cross = attention_blocks.attention(name="cross")
        self.copies = attention_blocks.attention(name="copies")
        self.gated = attention_blocks.attention(use_gate=True, name="gated")
        self.in_training = attention_blocks.attention(name="in_training")

    def build(self, input_shape):
        for layer in self._layers:
            layer.build(input_shape, input_shape)

    def call(self, x, training=None):
        x = self.cross(self.self_attention(x, x), x)
        # Two tensors, even if of equal values.
        x = self.copies(x * 1.0, x * 1.0)
        if training:
            x = self.in_training(x, x)
        return self.gated(x, x)


def test_what_stays_is_listed_with_its_reason():
    old = around(Mixed(name="mixed"))
    conversion = kl.convert_attention(old, batch())
    assert conversion.replaced == ("mixed/itself",)
    assert set(conversion.kept) == {
        f"mixed/{name}" for name in ("cross", "copies", "gated", "in_training")
    }
    assert "cross-attention" in conversion.kept["mixed/cross"]
    assert "cross-attention" in conversion.kept["mixed/copies"]
    assert "gate" in conversion.kept["mixed/gated"]
    assert "does not call it" in conversion.kept["mixed/in_training"]
    for before, after in zip(attention_of(old), attention_of(conversion.model), strict=True):
        if before.name != "itself":
            assert type(after) is layers.MultiHeadAttention
            for a, b in zip(before.variables, after.variables, strict=True):
                np.testing.assert_array_equal(np.array(a), np.array(b))


@keras.saving.register_keras_serializable("test_convert_blocks")
class OfWords(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(11, FEATURES)
        self.attention = attention_blocks.attention(name="attention")

    def call(self, ids):
        x = self.embedding(ids)
        return self.attention(x, x)


def test_a_subclassed_model_on_integers_is_converted_from_a_batch():
    ids = np.random.default_rng(1).integers(0, 11, (4, TOKENS)).astype("int32")
    model = OfWords()
    model(ids)
    conversion = kl.convert_attention(model, ids)
    assert conversion.replaced == ("attention",)
    assert kl.certify(conversion.model, inputs=ids).is_finite


class Unsaved(keras.Model):
    def __init__(self, table):
        super().__init__()
        self.table = table
        self.attention = attention_blocks.attention()

    def call(self, x):
        return self.attention(x, x)


def test_a_model_that_keras_cannot_make_again_is_refused():
    model = Unsaved(object())
    model(batch())
    with pytest.raises(ValueError, match=r"(?s)cannot be copied.*configuration.*Received"):
        kl.convert_attention(model)
