"""Every path of attention gives the values and gradients of the plain one, blocks of it too."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lipattn as kl
from keras_lipattn.layers import _distance_attention
from keras_lipattn.layers._blocked_attention import attend_in_blocks, block_size_for

LENGTH, FEATURES = 75, 16
_rng = np.random.default_rng(0)
_valid = np.arange(LENGTH)[None] < np.array([[60], [LENGTH]])
_pairs = _rng.random((2, LENGTH, LENGTH)) < 0.5

MASKS = {
    "full": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "window": ({"sliding_window": 4}, {}),
    "padding": ({}, {"query_mask": _valid}),
    "pairs": ({}, {"attention_mask": _pairs}),
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
    """Switches blocks on for short sequences."""

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
    layer = kl.L2MultiHeadAttention(1, 2)
    for length in (64, _distance_attention.BLOCKWISE_MIN_LENGTH):
        layer.compute_output_spec(keras.KerasTensor((1, length, 4)))
        layer(np.zeros((1, length, 4), "float32"))
    assert taken == [_distance_attention.BLOCKWISE_MIN_LENGTH]


def test_estimates_run_over_long_sequences(in_blocks):
    layer = kl.L2MultiHeadAttention(2, 4)
    layer.build((1, 12, FEATURES))
    x = _rng.normal(size=(1, 12, FEATURES)).astype("float32")
    expected = kl.estimate_lipschitz(layer, x, steps=5, restarts=1)
    in_blocks(True)
    found = kl.estimate_lipschitz(layer, x, steps=5, restarts=1)
    # The ascent follows second derivatives: wrong ones would lead it elsewhere.
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_any_length_fits_any_block(length):
    queries, keys, values = (tf.constant(_rng.normal(size=(1, 2, length, 3))) for _ in range(3))
    found = attend_in_blocks(
        queries, keys, values, hide=lambda scores, start: scores, block_size=16
    )
    weights = tf.nn.softmax(tf.matmul(queries, keys, transpose_b=True))
    # float64 throughout: only the order of sums differs.
    np.testing.assert_allclose(found, tf.matmul(weights, values), atol=1e-12)


def test_blocks_get_smaller_as_sequences_get_longer():
    sizes = [block_size_for(1, 4, length) for length in (4096, 16384, 10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 16
