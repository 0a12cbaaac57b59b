"""A converted model is the original but for its attention, and comes close to it."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_lipattn as kl

LENGTH, FEATURES = 6, 8


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(3)


def batch(size=16):
    return np.random.default_rng(5).normal(size=(size, LENGTH, FEATURES)).astype(np.float32)


def shake(model):
    """Biases, moving averages and all else away from the values they start with."""
    numbers = np.random.default_rng(7)
    for weight in model.weights:
        weight.assign(np.array(weight) + 0.1 * np.abs(numbers.normal(size=weight.shape)))


def encoder(norm=layers.LayerNormalization, length=LENGTH, attention=None, **call):
    inputs = keras.Input((length, FEATURES), name="tokens")
    x = norm(name="norm")(inputs)
    attention = attention or layers.MultiHeadAttention(2, 4, name="attention")
    x = layers.Add(name="sum")([inputs, attention(x, x, **call)])
    x = layers.BatchNormalization(name="statistics")(x)
    x = layers.Dropout(0.2, seed=11, name="drop")(x)
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x), name="encoder")
    shake(model)
    return model


def nested(shared=False):
    """The attention lies two graphs deep, once in a Sequential model."""
    tokens = keras.Input((LENGTH, FEATURES))
    mixed = layers.MultiHeadAttention(2, 4, name="deep")(tokens, tokens)
    block = keras.Model(tokens, layers.Dense(FEATURES, name="inside")(mixed), name="block")
    inputs = keras.Input((LENGTH, FEATURES))
    x = keras.Sequential([keras.Input((LENGTH, FEATURES)), block], name="stack")(inputs)
    if shared:
        x = block(x)
    model = keras.Model(inputs, layers.Dense(2, name="last")(x))
    shake(model)
    return model


def error(new, old, x):
    expected = np.array(old(x))
    return np.linalg.norm(np.array(new(x)) - expected) / np.linalg.norm(expected)


def leaves(model):
    """Layers of the graphs of a model, those of nested ones in their place."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from leaves(layer)
        else:
            yield layer


@pytest.mark.parametrize("build", [encoder, nested])
def test_everything_else_is_copied_bit_for_bit(build):
    old = build()
    x = batch()
    # Moves the moving averages and the state of the random numbers.
    old(x, training=True)
    conversion = kl.convert_attention(old)
    assert conversion.model.name == old.name
    for before, after in zip(leaves(old), leaves(conversion.model), strict=True):
        assert before.name == after.name and before is not after
        if type(before) is layers.MultiHeadAttention:
            assert before.name in {path.split("/")[-1] for path in conversion.replaced}
            assert type(after) is kl.L2MultiHeadAttention
            continue
        assert type(before) is type(after)
        for a, b in zip(before.variables, after.variables, strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("build", [encoder, nested])
def test_the_original_is_unchanged(build):
    old = build()
    x = batch()
    output, weights, config = np.array(old(x)), old.get_weights(), old.get_config()
    new = kl.convert_attention(old, x).model
    new.compile("adam", "mse")
    new.fit(x, np.zeros_like(np.array(new(x))), verbose=0)
    np.testing.assert_array_equal(np.array(old(x)), output)
    for a, b in zip(old.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert old.get_config() == config


def test_a_shared_model_stays_shared():
    old = nested(shared=True)
    conversion = kl.convert_attention(old, batch())
    assert conversion.replaced == ("stack/block/deep",)
    # Query and key are one kernel, and only the output has a bias.
    assert len(conversion.model.trainable_weights) == len(old.trainable_weights) - 4


def representable(heads=2, key_dim=3):
    """Tied keys, values made of them, and tokens of one norm in every head."""
    inputs = keras.Input((LENGTH, FEATURES))
    attention = layers.MultiHeadAttention(heads, key_dim, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs))
    numbers = np.random.default_rng(2)
    # Orthonormal columns: the projected norms are those of the coordinates they span.
    basis, _ = np.linalg.qr(numbers.normal(size=(FEATURES, FEATURES)))
    kernel = basis[:, : heads * key_dim].reshape(FEATURES, heads, key_dim)
    mix = numbers.normal(size=(heads, key_dim, key_dim))
    attention.query_dense.kernel.assign(1.5 * kernel)
    attention.key_dense.kernel.assign(1.5 * kernel)
    attention.value_dense.kernel.assign(np.einsum("dhk,hkv->dhv", kernel, mix))
    attention.value_dense.bias.assign(numbers.normal(size=(heads, key_dim)))
    attention.output_dense.bias.assign(numbers.normal(size=FEATURES))
    y = numbers.normal(size=(16, LENGTH, heads, key_dim))
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    x = np.einsum("bthk,dhk->btd", y, kernel)
    rest = numbers.normal(size=(16, LENGTH, FEATURES - heads * key_dim))
    return model, (x + rest @ basis[:, heads * key_dim :].T).astype(np.float32)


def test_what_can_be_represented_is_converted_exactly():
    model, x = representable()
    conversion = kl.convert_attention(model, x)
    # Float32 evaluation, with kernels of norm about 1.
    assert conversion.relative_error < 1e-5


def test_the_attention_is_what_makes_it_exact():
    model, x = representable()
    conversion = kl.convert_attention(model, x)
    attention = conversion.model.get_layer("attention")
    attention.query_kernel.assign(0.5 * np.array(attention.query_kernel))
    # The factor is compensated, the distances are not.
    attention.value_kernel.assign(4.0 * np.array(attention.value_kernel))
    assert error(conversion.model, model, x) > 1e-2


def test_the_error_is_that_of_the_model():
    old = encoder()
    x = batch()
    conversion = kl.convert_attention(old, x)
    assert kl.convert_attention(old).relative_error is None
    assert conversion.relative_error == pytest.approx(error(conversion.model, old, x), rel=1e-4)
    assert 0.0 < conversion.relative_error < 1.0


def test_fine_tuning_on_the_outputs_of_the_original_reduces_the_error():
    old = encoder()
    x = batch(64)
    conversion = kl.convert_attention(old, x)
    conversion.model.compile(keras.optimizers.Adam(0.003), "mse")
    # Without dropout, so that 60 steps are enough.
    conversion.model.get_layer("drop").rate = 0.0
    conversion.model.get_layer("statistics").trainable = False
    conversion.model.fit(x, np.array(old(x)), epochs=15, batch_size=16, verbose=0)
    assert error(conversion.model, old, x) < 0.5 * conversion.relative_error


def test_the_causal_flag_is_kept():
    inputs = keras.Input((LENGTH, FEATURES))
    mixed = layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True)
    new = kl.convert_attention(keras.Model(inputs, mixed)).model
    x = batch()
    changed = x.copy()
    changed[:, 4:] += 1.0
    difference = np.abs(np.array(new(x)) - np.array(new(changed))).max(axis=(0, 2))
    assert (difference[:4] == 0.0).all() and (difference[4:] > 0.0).all()


def test_masks_are_kept():
    inputs = keras.Input((LENGTH, FEATURES))
    padding = keras.Input((LENGTH,), dtype="bool")
    mixed = layers.MultiHeadAttention(2, 4)(inputs, inputs, key_mask=padding)
    new = kl.convert_attention(keras.Model([inputs, padding], mixed)).model
    x, valid = batch(), np.arange(LENGTH)[None].repeat(16, 0) < 4
    changed = x.copy()
    changed[:, 4:] += 1.0
    np.testing.assert_array_equal(
        np.array(new([x, valid]))[:, :4], np.array(new([changed, valid]))[:, :4]
    )
    assert np.abs(np.array(new([x, valid])) - np.array(new([x, valid | True]))).max() > 1e-3


def test_the_mask_of_an_embedding_is_kept():
    ids = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(10, FEATURES, mask_zero=True)(ids)
    old = keras.Model(ids, layers.MultiHeadAttention(2, 4)(x, x))
    tokens = np.array([[1, 2, 3, 0, 0, 0]])
    new = kl.convert_attention(old, tokens).model
    assert (np.array(new(tokens))[:, 3:] == 0.0).all()


def test_options_are_kept():
    attention = layers.MultiHeadAttention(
        2,
        4,
        value_dim=3,
        dropout=0.3,
        use_bias=False,
        output_shape=FEATURES,
        attention_axes=(1,),
        sliding_window=2,
        kernel_regularizer="l2",
        kernel_constraint="max_norm",
        trainable=False,
        seed=4,
        name="attention",
    )
    old = encoder(attention=attention)
    new = kl.convert_attention(old, batch()).model.get_layer("attention")
    config = attention.get_config()
    del config["use_gate"]
    ours = new.get_config()
    assert {name: ours.get(name) for name in config} == config


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_the_dtype_is_kept(policy):
    inputs = keras.Input((LENGTH, FEATURES), dtype="float32")
    old = keras.Model(inputs, layers.MultiHeadAttention(2, 4, dtype=policy)(inputs, inputs))
    conversion = kl.convert_attention(old, batch())
    assert conversion.model.layers[1].dtype_policy.name == policy
    assert conversion.model.output.dtype == old.output.dtype
    assert np.isfinite(conversion.relative_error)


def test_heads_that_compare_nothing_stay_finite():
    old = encoder()
    old.get_layer("attention").query_dense.kernel.assign(np.zeros((FEATURES, 2, 4)))
    conversion = kl.convert_attention(old, batch())
    assert np.isfinite(conversion.relative_error)


def test_more_key_dimensions_than_features():
    attention = layers.MultiHeadAttention(2, 2 * FEATURES, name="attention")
    conversion = kl.convert_attention(encoder(attention=attention), batch())
    assert np.isfinite(conversion.relative_error)


def test_the_converted_model_has_a_certificate():
    old = encoder(norm=kl.CenterNormalization)
    assert not kl.certify(old).is_finite
    assert kl.certify(kl.convert_attention(old).model).is_finite


def test_the_converted_model_can_be_saved(tmp_path):
    new = kl.convert_attention(encoder()).model
    new.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.array(again(batch())), np.array(new(batch())))


def test_a_model_without_attention_is_copied():
    inputs = keras.Input((LENGTH, FEATURES))
    old = keras.Model(inputs, layers.Dense(2)(inputs))
    conversion = kl.convert_attention(old, batch())
    assert conversion.replaced == () and conversion.relative_error == 0.0


def test_several_outputs_count_together():
    inputs = keras.Input((LENGTH, FEATURES))
    mixed, scores = layers.MultiHeadAttention(2, 4)(inputs, inputs, return_attention_scores=True)
    old = keras.Model(inputs, {"mixed": mixed, "scores": scores})
    conversion = kl.convert_attention(old, batch())
    before, after = old(batch()), conversion.model(batch())
    parts = [[np.ravel(y[name]) for name in ("mixed", "scores")] for y in (before, after)]
    a, b = (np.concatenate(part) for part in parts)
    measured = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert conversion.relative_error == pytest.approx(measured, rel=1e-4)


class Inside(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4, name="hidden")

    def call(self, x):
        return self.attention(x, x)


class Louder(layers.MultiHeadAttention):
    """Computes something else."""


def refused(call):
    inputs = keras.Input((LENGTH, FEATURES))
    return keras.Model(inputs, call(inputs))


@pytest.mark.parametrize(
    "call, path, reason",
    [
        (
            lambda x: layers.MultiHeadAttention(2, 4, name="a1")(x, layers.Dense(8)(x)),
            "a1",
            "value other than the query.*cross-attention",
        ),
        (
            lambda x: layers.MultiHeadAttention(2, 4, name="a2")(x, x, key=layers.Dense(8)(x)),
            "a2",
            "key other than the query.*cross-attention",
        ),
        (
            lambda x: layers.MultiHeadAttention(2, 4, use_gate=True, name="a3")(x, x),
            "a3",
            "gate",
        ),
        (lambda x: Louder(2, 4, name="a4")(x, x), "a4", "subclass Louder"),
    ],
)
def test_what_cannot_be_converted_stays_with_its_reason(call, path, reason):
    old = refused(call)
    conversion = kl.convert_attention(old, batch())
    assert conversion.replaced == ()
    assert list(conversion.kept) == [path]
    assert re.search(reason, conversion.kept[path])
    assert conversion.relative_error == 0.0


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_quantized_attention_stays():
    quantized = encoder()
    quantized.quantize("int8")
    conversion = kl.convert_attention(quantized, batch())
    assert conversion.replaced == ()
    assert re.search("quantized.*int8", conversion.kept["attention"])
    assert conversion.relative_error == 0.0


def test_a_quantized_layer_elsewhere_is_copied():
    old = encoder()
    old.get_layer("logits").quantize("int8")
    new = kl.convert_attention(old).model
    assert new.get_layer("logits").quantization_mode == "int8"
    for a, b in zip(
        old.get_layer("logits").variables, new.get_layer("logits").variables, strict=True
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b))


def test_low_rank_updates_are_merged():
    old = encoder()
    dense = old.get_layer("attention").key_dense
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.random.default_rng(1).normal(size=dense.lora_kernel_b.shape))
    merged = kl.convert_attention(old).model.get_layer("attention").query_kernel
    dense.lora_kernel_b.assign(np.zeros(dense.lora_kernel_b.shape))
    plain = kl.convert_attention(old).model.get_layer("attention").query_kernel
    assert np.abs(np.array(merged) - np.array(plain)).max() > 1e-2


@pytest.mark.parametrize("thing", [None, layers.Dense(2), keras.Sequential([layers.Dense(2)])])
def test_only_models_with_a_graph(thing):
    with pytest.raises(ValueError, match="Received: model="):
        kl.convert_attention(thing)
