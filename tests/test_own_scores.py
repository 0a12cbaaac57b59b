"""Attention with a score of one's own: five methods give caps, certificates and condensing."""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import randomize
from keras import ops

import keras_lipattn as kl

TOKENS, FEATURES = 5, 6
CAPS = {
    "none": {},
    "spectral": {"spectral_norm": 0.5},
    "layer": {"lipschitz_bound": 0.7, "lipschitz_norm": "token"},
}


class Folded(NamedTuple):
    projection: Any
    output: Any


@keras.saving.register_keras_serializable(package="own_scores")
class PositionAttention(kl.layers.SelfAttention):
    """Weights `softmax_j(-|i - j|)`: the example of `SelfAttention`, with a bound in every norm."""

    def add_kernels(self):
        heads, size = self.num_heads, self.value_dim
        self.add_attention_kernel("value_kernel", (self.features, heads * size))
        self.add_attention_kernel("output_kernel", (heads * size, *self.output_token))

    def fold(self, kernels, factors, xp):
        return Folded(*(kernel * factor for kernel, factor in zip(kernels, factors, strict=True)))

    def matrices(self, weights, norm, xp):
        return {"product": xp.matmul(weights.projection, weights.output)}

    def bound(self, weights, norms, norm, tokens, mask, xp):
        if norm == "token":
            return norms["product"]
        if norm == "l2":
            # Rows sum to one, columns to at most the number of tokens.
            return math.inf if tokens is None else math.sqrt(tokens) * norms["product"]
        return xp.max(xp.sum(xp.abs(xp.matmul(weights.projection, weights.output)), axis=0))

    def attend(self, tokens, weights, mask, training, return_scores):
        position = ops.arange(tokens.shape[1], dtype=tokens.dtype)
        scores = -ops.abs(position[:, None] - position)
        pairs = mask.softmax(scores[None, None])
        return ops.matmul(pairs[:, 0], ops.matmul(tokens, weights.projection)), None, pairs


def built(cap, **options):
    layer = PositionAttention(2, 4, dtype="float64", **CAPS[cap], **options)
    layer.build((None, TOKENS, FEATURES))
    randomize(layer)
    return layer


def jacobian_norm(function, x, norm):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    matrix = tape.jacobian(y, x).numpy()[0][:, :, 0]
    if norm == "l2":
        return np.linalg.norm(matrix.reshape(TOKENS * FEATURES, -1), 2)
    if norm == "linf":
        return np.abs(matrix).sum(axis=(2, 3)).max()
    # A lower bound of the norm of tokens: all tokens move along one direction.
    return max(np.linalg.norm(matrix.sum(axis=2)[row], 2) for row in range(TOKENS))


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cap", CAPS)
def test_the_certificate_is_an_upper_bound(cap, causal, norm):
    layer = built(cap)
    inputs = keras.Input((TOKENS, FEATURES), dtype="float64")
    model = keras.Model(inputs, layer(inputs, use_causal_mask=causal))
    total = kl.certify(model, norm=norm, check=True).total
    x = tf.constant(np.random.default_rng(0).normal(size=(1, TOKENS, FEATURES)))
    # The layer is linear: one Jacobian is all there is, up to float64 rounding.
    assert jacobian_norm(model, x, norm) <= total * (1.0 + 1e-12)
    mask = "causal" if causal else "full"
    assert total == pytest.approx(layer.lipschitz(norm=norm, mask=mask).value)


def test_the_certificate_of_row_sums_is_exact_in_the_token_norm():
    layer = built("none")
    x = tf.constant(np.random.default_rng(1).normal(size=(1, TOKENS, FEATURES)))
    assert jacobian_norm(layer, x, "token") >= layer.lipschitz(norm="token").value * (1.0 - 1e-8)


@pytest.mark.parametrize("cap", ["spectral", "layer"])
def test_caps_hold_and_condensing_changes_nothing(cap):
    layer = built(cap)
    if cap == "layer":
        assert 0.69 <= layer.lipschitz(norm="token").value <= 0.7
    x = np.random.default_rng(2).normal(size=(2, TOKENS, FEATURES))
    with kl.condensed(layer):
        condensed = layer(x)
    # Remembered norms carry an allowance of 1e-6 each.
    np.testing.assert_allclose(condensed, layer(x), rtol=0, atol=1e-5)


def test_padding_is_not_seen_and_stays_zero():
    layer = built("none")
    x = np.random.default_rng(3).normal(size=(1, TOKENS, FEATURES))
    mask = np.arange(TOKENS)[None] < 3
    y, hidden = (
        np.asarray(layer(np.where(mask[..., None], x, padding), query_mask=mask))
        for padding in (7.0, np.nan)
    )
    np.testing.assert_array_equal(y[:, 3:], 0.0)
    np.testing.assert_array_equal(hidden, y)


def test_the_monitor_penalizes_it():
    inputs = keras.Input((TOKENS, FEATURES))
    layer = PositionAttention(2, 4, name="own")
    x = keras.layers.GlobalAveragePooling1D()(layer(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    x = np.random.default_rng(4).normal(size=(8, TOKENS, FEATURES))
    monitor = kl.LipschitzMonitor(norm="token", penalty=0.1)
    logs = model.fit(x, np.zeros((8, 1)), epochs=2, verbose=0, callbacks=[monitor]).history
    assert any("own" in key for key in logs)


@pytest.mark.parametrize("make", [lambda: built("none"), lambda: kl.ScaledCosineAttention(2, 4)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_weights_of_tokens_are_refused_where_no_bound_covers_them(make, symbolic):
    x = np.zeros((1, TOKENS, FEATURES))
    weights = np.ones((1, TOKENS))
    if symbolic:
        x, weights = keras.Input((TOKENS, FEATURES)), keras.Input((TOKENS,))
    with pytest.raises(ValueError, match=r"not support `token_weights`.*Received: token_weights"):
        make()(x, token_weights=weights)
