"""Conversion to bounded tokens loses nothing inside the ball, and the result has a constant."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalOperand=false

import keras
import numpy as np
import pytest
from keras import layers

import keras_lipattn as kl

FEATURES = 8


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(3)


def shake(model):
    """All weights away from the values they start with, biases of attention among them."""
    numbers = np.random.default_rng(7)
    for weight in model.trainable_weights:
        weight.assign(np.array(weight) + 0.1 * numbers.normal(size=weight.shape))
    return model


def plain(**options):
    inputs = keras.Input((6, FEATURES))
    attention = layers.MultiHeadAttention(2, 4, **options)
    x = layers.Add()([inputs, attention(inputs, inputs)])
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def causal():
    inputs = keras.Input((6, FEATURES))
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True)
    return keras.Model(inputs, layers.Dense(3)(x))


def axes():
    inputs = keras.Input((6, FEATURES))
    x = layers.Reshape((2, 3, FEATURES))(inputs)
    x = layers.MultiHeadAttention(2, 4, attention_axes=(2,), dropout=0.1)(x, x)
    return keras.Model(inputs, x)


def cross():
    inputs = keras.Input((6, FEATURES))
    memory = layers.Dense(5)(inputs[:, 2:])
    key = layers.Dense(3)(memory)
    x = layers.MultiHeadAttention(2, 4)(inputs, memory)
    x = layers.MultiHeadAttention(2, 4, value_dim=3, output_shape=7)(x, memory, key)
    return keras.Model(inputs, x)


class Block(layers.Layer):
    """Makes its attention itself, as in the examples of Keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4)
        self.norm = layers.LayerNormalization()

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.norm.build(input_shape)

    def call(self, inputs):
        return inputs + self.attention(self.norm(inputs), inputs)


def custom():
    inputs = keras.Input((6, FEATURES))
    return keras.Model(inputs, Block()(Block()(inputs)))


MODELS = {
    "plain": plain,
    "dropout": lambda: plain(dropout=0.2),
    "window": lambda: plain(sliding_window=2),
    "no bias": lambda: plain(use_bias=False),
    "causal": causal,
    "axes": axes,
    "cross": cross,
    "custom": custom,
}


def batch(size, seed=5):
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(size=(size, 6, FEATURES)), -2.0, 2.0).astype("float32")


def error(new, old, x):
    expected = np.array(old(x))
    return np.linalg.norm(np.array(new(x)) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_and_the_certificate_is_finite(name, tmp_path):
    old = shake(MODELS[name]())
    x, held_out = batch(16), batch(16, seed=6)
    found = kl.convert_attention(old, held_out, to="bounded", calibration=x, margin=2.0)
    assert found.replaced and not found.kept
    assert set(found.radii) == set(found.touching) == set(found.replaced)
    assert max(found.touching.values()) == 0.0
    assert found.relative_error <= 1e-5
    # Inside the ball the new layers give what the old ones gave, on what they were measured on too.
    assert error(found.model, old, x) <= 1e-5
    for norm in ("l2", "token", "linf"):
        assert kl.certify(found.model, norm=norm, check=True).is_finite
        if name in ("plain", "causal", "axes", "cross"):
            assert not kl.certify(old, norm=norm).is_finite
    found.model.save(tmp_path / "model.keras")
    with keras.saving.custom_object_scope({"Block": Block}):
        again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(x), found.model(x))


def test_radii_are_those_of_the_largest_token_times_the_margin():
    old, x = shake(plain()), batch(16)
    found = kl.convert_attention(old, to="bounded", calibration=x)
    (radius,) = found.radii.values()
    assert radius == pytest.approx(1.1 * np.linalg.norm(x, axis=-1).max())
    assert found.touching == {} and found.relative_error is None
    larger = kl.convert_attention(old, to="bounded", calibration=x, margin=3.0)
    assert next(iter(larger.radii.values())) == pytest.approx(radius / 1.1 * 3.0)


def test_the_share_of_tokens_outside_is_reported():
    old, x = shake(plain()), batch(16)
    held_out = batch(16, seed=6)
    held_out[:4] *= 100.0
    found = kl.convert_attention(old, held_out, to="bounded", calibration=x)
    (share,) = found.touching.values()
    assert share == pytest.approx(0.25)
    assert found.relative_error > 1e-3


def test_the_penalty_works_from_the_first_step():
    old, x = shake(plain()), batch(64)
    old.compile("adam", "mse")
    model = kl.convert_attention(old, to="bounded", calibration=x).model
    before = kl.certify(model, norm="token").total
    monitor = kl.LipschitzMonitor(norm="token", penalty=1.0, target=1.0)
    target = old.predict(x, verbose=0)
    history = model.fit(x, target, epochs=3, batch_size=8, verbose=0, callbacks=[monitor]).history
    assert np.isfinite(history["lipschitz_total"]).all()
    assert kl.certify(model, norm="token").total < before


def test_what_is_not_plain_attention_is_kept():
    inputs = keras.Input((6, FEATURES))
    gated = layers.MultiHeadAttention(2, 4, use_gate=True)(inputs, inputs)
    own = type("Own", (layers.MultiHeadAttention,), {})(2, 4)(inputs, inputs)
    model = keras.Model(inputs, layers.Add()([gated, own]))
    found = kl.convert_attention(model, to="bounded", calibration=batch(4))
    assert not found.replaced and len(found.kept) == 2
    assert "gate" in " ".join(found.kept.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "cosine"}, r"`to` must be .*Received: to='cosine'"),
        ({"to": "bounded"}, r"needs `calibration`.*Received: calibration=None"),
        ({"calibration": batch(2)}, r'`calibration` is for `to="bounded"`.*Received: to=\'l2\''),
        ({"to": "bounded", "calibration": batch(2), "margin": 0.5}, r"Received: margin=0.5"),
        ({"to": "bounded", "calibration": batch(2), "margin": "1"}, r"Received: margin=1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kl.convert_attention(plain(), **options)
