"""Every path of attention gives the values and gradients of the plain one, blocks of it too."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lipattn as kl
from keras_lipattn.layers import _block_layout, _distance_attention
from keras_lipattn.layers._block_layout import layout_for
from keras_lipattn.layers._distance_attention import attend_blockwise, attention_weights
from keras_lipattn.layers._masks import Mask

LENGTH, FEATURES = 75, 16
_rng = np.random.default_rng(0)
_valid = np.arange(LENGTH)[None] < np.array([[60], [LENGTH]])
_pairs = _rng.random((2, LENGTH, LENGTH)) < 0.5

MASKS = {
    "full": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "window": ({"sliding_window": 4}, {}),
    "window, padding": ({"sliding_window": 4}, {"query_mask": _valid}),
    "window, causal": ({"sliding_window": 6}, {"use_causal_mask": True}),
    "window of blocks": ({"sliding_window": 14}, {}),
    "window of half": ({"sliding_window": 40}, {"use_causal_mask": True}),
    "window of all": ({"sliding_window": 400}, {}),
    "window, relative": ({"sliding_window": 6, "max_relative_position": 3}, {}),
    "padding": ({}, {"query_mask": _valid}),
    "pairs": ({}, {"attention_mask": _pairs}),
    "pairs, causal": ({}, {"attention_mask": _pairs, "use_causal_mask": True}),
    "keys of pairs": ({"sliding_window": 9}, {"attention_mask": _pairs[:, :1]}),
    "queries of pairs": ({"sliding_window": 9}, {"attention_mask": _pairs[:, :, :1]}),
    "pairs per head": ({}, {"attention_mask": np.stack([_pairs, ~_pairs], axis=1)}),
    "relative": ({"max_relative_position": 20}, {"use_causal_mask": True}),
    "relative, padding": (
        {"max_relative_position": 3, "sliding_window": 9},
        {"attention_mask": _pairs, "query_mask": _valid},
    ),
    "all": ({"sliding_window": 9}, {"attention_mask": _pairs[0], "query_mask": _valid}),
}


@pytest.fixture
def in_blocks(monkeypatch):
    """Switches blocks on for short sequences: several steps of several blocks."""
    monkeypatch.setattr(_block_layout, "BLOCK_SIZES", (4, 4))
    monkeypatch.setattr(_block_layout, "BLOCK_ENTRIES_OF_HEAD", 200)

    def switch(on):
        monkeypatch.setattr(_distance_attention, "BLOCKWISE_MIN_LENGTH", 1 if on else 10**9)

    return switch


def _outputs_and_gradients(layer, x, options, jit_compile, *, with_scores=False):
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, return_attention_scores=with_scores, **options)
            if with_scores:
                y, _ = y
            loss = tf.reduce_sum(tf.square(y) * tf.range(1.0, FEATURES + 1.0))
        weights = [weight.value for weight in layer.trainable_variables]
        return [y, *tape.gradient(loss, [x, *weights])]

    return tf.function(step, jit_compile=jit_compile, autograph=False)(x)


@pytest.mark.parametrize(
    ("name", "blocks", "jit_compile"),
    [
        *((name, blocks, False) for name in MASKS for blocks in (False, True)),
        ("full", True, True),
        ("causal", True, True),
        ("window, causal", True, True),
        ("window, relative", True, True),
        ("relative", True, True),
        ("all", True, True),
        ("all", False, True),
    ],
)
def test_written_out_gradients_are_those_of_the_graph(name, blocks, jit_compile, in_blocks):
    built, called = MASKS[name]
    layer = kl.L2MultiHeadAttention(2, 8, **built)
    x = tf.constant(_rng.normal(size=(2, LENGTH, FEATURES)), "float32")
    layer(x)
    if layer.relative_bias is not None:
        layer.relative_bias.assign(_rng.normal(size=layer.relative_bias.shape))
    # With the scores as an output nothing is written out by hand.
    expected = _outputs_and_gradients(layer, x, called, False, with_scores=True)
    in_blocks(blocks)
    found = _outputs_and_gradients(layer, x, called, jit_compile)
    for a, b in zip(expected, found, strict=True):
        # Float32 sums of different order; a gradient through a softmax row of 75 terms loses one
        # digit more than the value.
        np.testing.assert_allclose(a, b, atol=5e-5 * max(1.0, float(tf.reduce_max(abs(a)))))


def test_a_later_token_does_not_reach_earlier_blocks(in_blocks):
    in_blocks(True)
    layer = kl.L2MultiHeadAttention(2, 8)
    x = _rng.normal(size=(1, LENGTH, FEATURES)).astype("float32")
    changed = x.copy()
    changed[:, -1] = 1e4
    first, second = (layer(v, use_causal_mask=True)[:, :-1] for v in (x, changed))
    np.testing.assert_array_equal(first, second)


def test_a_long_sequence_is_taken_in_blocks_by_itself(monkeypatch):
    taken = []
    original = _distance_attention.attend_blockwise
    monkeypatch.setattr(
        _distance_attention,
        "attend_blockwise",
        lambda y, mask: taken.append(y.shape[2]) or original(y, mask),
    )
    least = _distance_attention.BLOCKWISE_MIN_LENGTH
    for window, lengths in ((None, (64, least // 2, least)), (128, (512, least // 2))):
        layer = kl.L2MultiHeadAttention(1, 2, sliding_window=window)
        for length in lengths:
            layer.compute_output_spec(keras.KerasTensor((1, length, 4)))
            layer(np.zeros((1, length, 4), "float32"))
    assert taken == [least, least // 2]


def test_estimates_run_over_long_sequences(in_blocks):
    layer = kl.L2MultiHeadAttention(2, 4)
    layer.build((1, 12, FEATURES))
    x = _rng.normal(size=(1, 12, FEATURES)).astype("float32")
    expected = kl.estimate_lipschitz(layer, x, steps=5, restarts=1)
    in_blocks(True)
    found = kl.estimate_lipschitz(layer, x, steps=5, restarts=1)
    # The ascent follows second derivatives: wrong ones would lead it elsewhere.
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-4)


_WINDOWS = (None, 1, 2, 5, 8, 9, 33, 1000)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 40, 63])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length_fits_any_block_and_window(length, causal, monkeypatch):
    y = tf.constant(_rng.normal(size=(1, 2, length, 3)))
    for window in _WINDOWS:
        mask = Mask(use_causal_mask=causal, sliding_window=window)
        expected = tf.matmul(attention_weights(y, mask), y)
        for size, entries in ((1, 1), (4, 300), (16, 10**4)):
            monkeypatch.setattr(_block_layout, "BLOCK_SIZES", (size, size))
            monkeypatch.setattr(_block_layout, "BLOCK_ENTRIES_OF_HEAD", entries)
            # float64 throughout: only the order of sums differs.
            np.testing.assert_allclose(attend_blockwise(y, mask), expected, atol=1e-12)


def _scores_of(length, mask):
    layout = layout_for(length, 1, mask)
    return sum(span.steps * layout.step_size * span.width for span in layout.spans), max(
        layout.step_size * span.width for span in layout.spans
    )


@pytest.mark.parametrize("length", [1024, 3000, 4096, 16384, 10**5])
def test_blocks_leave_out_what_is_hidden(length):
    computed, at_once = _scores_of(length, Mask())
    # Queries are added to fill the last block: less than one of 16 in each.
    assert length**2 <= computed <= length**2 * 1.07
    assert at_once <= max(2**20, 17 * length)
    computed, _ = _scores_of(length, Mask(use_causal_mask=True))
    assert computed <= 0.6 * length**2
    for window in (2, 30, 128, 200):
        computed, at_once = _scores_of(length, Mask(sliding_window=window))
        # A block of at most as many queries as the window, and up to a block more on each side.
        assert computed <= 1.3 * length * max(48, 5 * window)
        assert at_once <= 2**20


@pytest.mark.parametrize("name", ["full", "causal", "window, causal"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_dropout_in_blocks_drops_the_same_weights_both_ways(name, jit_compile, in_blocks):
    in_blocks(True)
    built, called = MASKS[name]
    mask = Mask(**built, **called)
    y = tf.constant(_rng.normal(size=(2, 2, LENGTH, 3)))
    direction = tf.constant(_rng.normal(size=(2, 2, LENGTH, LENGTH)))
    # The weights are applied to the unit vectors: they are the output.
    units = tf.broadcast_to(tf.eye(LENGTH, dtype="float64"), direction.shape)

    @tf.function(autograph=False, jit_compile=jit_compile)
    def drop(y, units, seed):
        with tf.GradientTape() as tape:
            tape.watch([y, units])
            weights = attend_blockwise(y, mask, units, dropout=0.25, seed=seed)
        gradients: Any = tape.gradient(weights, [y, units], [direction])
        return weights, *gradients

    weights, to_y, to_units = drop(y, units, tf.constant([3, 7], "int64"))
    plain = attention_weights(y, mask)
    kept = tf.cast(weights > 0.0, "float64") / 0.75
    np.testing.assert_allclose(weights, plain * kept, atol=1e-12)
    with tf.GradientTape() as tape:
        tape.watch([y, units])
        loss = tf.reduce_sum(tf.matmul(attention_weights(y, mask) * kept, units) * direction)
    gradients: Any = tape.gradient(loss, [y, units])
    for found, expected in zip((to_y, to_units), gradients, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-10)
    # Draws of heads, blocks and calls are independent: five standard deviations.
    shown = plain.numpy() > 0.0
    draws = weights.numpy() > 0.0
    other = drop(y, units, tf.constant([3, 8], "int64"))[0].numpy() > 0.0
    parts = [
        (draws, other),
        (draws[:, :1], draws[:, 1:]),
        (draws[:1], draws[1:]),
        (draws[..., 20:40, 20:40], draws[..., 24:44, 24:44]),
    ]
    visible = [shown, shown[:, :1], shown[:1], shown[..., 20:40, 20:40]]
    deviation = 5.0 / np.sqrt(shown.sum())
    assert abs(draws[shown].mean() - 0.75) < 0.44 * deviation
    for (first, second), where in zip(parts, visible, strict=True):
        agree = (first == second)[where].mean()
        assert abs(agree - 0.625) < 0.49 * 5.0 / np.sqrt(where.sum())


def test_dropout_of_a_long_sequence_is_off_at_inference_and_changes_with_each_call(in_blocks):
    in_blocks(True)
    layer = kl.L2MultiHeadAttention(2, 8, dropout=0.5, seed=0)
    x = tf.constant(_rng.normal(size=(2, LENGTH, FEATURES)), "float32")
    expected, _ = layer(x, return_attention_scores=True)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    first, second = (layer(x, training=True) for _ in range(2))
    assert not np.allclose(first, second, atol=1e-3)
    # The mean over many draws is the output without dropout: 5 standard deviations of each entry.
    draw = tf.function(lambda: layer(x, training=True), autograph=False)
    draws = np.stack([draw() for _ in range(200)])
    error = np.abs(draws.mean(0) - expected)
    assert (error < 5.0 * draws.std(0) / np.sqrt(200) + 1e-5).mean() > 0.999


def test_blocks_take_no_examples():
    y = tf.zeros((0, 2, 40, 3))
    for mask in (Mask(), Mask(use_causal_mask=True), Mask(sliding_window=3)):
        with tf.GradientTape() as tape:
            tape.watch(y)
            found = attend_blockwise(y, mask)
        assert found.shape == tape.gradient(found, y).shape == y.shape
