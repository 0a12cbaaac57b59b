"""What a token may not see does not reach it: causal, padded, hidden and foreign tokens."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import BATCH, FEATURES, LENGTH, Case, randomize

import keras_lipattn as kl
from keras_lipattn.layers import _distance_attention

# Every path through the layer: with and without caps, norms from Gram iteration, from the cache,
# or turned into constants, the full matrix of weights or blocks of it, in training (where the
# derivative is written out), eager calls or graphs.
PATHS = ("plain", "capped", "remembered", "condensed", "blocks", "window", "training", "graph")
CHANGES = (0.5, 100.0, 1e30)
PADDED = (0.5, 1e30, np.inf, np.nan)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """A layer with random weights, and a function that runs it on this path."""
    name = request.param
    cap = None if name in ("plain", "window", "training", "graph") else "l2"
    layer = Case("window" if name == "window" else "plain", cap=cap, dtype="float32").layer()
    if name == "remembered":
        layer.condense()
    if name == "blocks":
        monkeypatch.setattr(_distance_attention, "BLOCKWISE_MIN_LENGTH", 1)

    called = tf.function(layer) if name == "graph" else layer

    def run(x, **call):
        return called(tf.convert_to_tensor(x), training=name == "training", **call)

    with kl.condensed(layer) if name == "condensed" else contextlib.nullcontext():
        yield run


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(BATCH, LENGTH, FEATURES)).astype("float32")


def _changed(x, where, value):
    other = x.copy()
    other[where] = value
    return other


def test_later_tokens_do_not_reach_earlier_ones(path, x):
    before = path(x, use_causal_mask=True)
    for value, first in zip(CHANGES, (LENGTH - 1, 1, 2), strict=True):
        after = path(_changed(x, np.s_[:, first:], value), use_causal_mask=True)
        np.testing.assert_array_equal(after[:, :first], before[:, :first])
        if value < 1e30:
            assert not np.allclose(after[:, first:], before[:, first:])


@pytest.mark.parametrize(
    ("mask", "causal"),
    [("query_mask", False), ("value_mask", True), ("key_mask", False), ("implicit", True)],
)
def test_padded_tokens_reach_nobody_whatever_is_in_them(path, x, mask, causal):
    valid = np.array([[True, False, True, True, False], [False, True, True, False, True]])

    def run(x):
        if mask != "implicit":
            return path(x, use_causal_mask=causal, **{mask: valid})
        # Half of the mask comes along with the input.
        x = tf.constant(x)
        x._keras_mask = tf.constant(valid | [[False], [True]])
        return path(x, use_causal_mask=causal, query_mask=valid)

    before = run(x)
    np.testing.assert_array_equal(before[~valid], 0.0)
    for value in PADDED:
        np.testing.assert_array_equal(run(_changed(x, ~valid, value)), before)


def test_gradients_pass_by_padding(path, x):
    valid = np.array([[True, False, True, True, False], [True, True, True, False, False]])

    def gradient(x):
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = path(x, query_mask=valid, use_causal_mask=True)
            total = tf.reduce_sum(tf.square(y) + y)
        return np.asarray(tape.gradient(total, x))

    before = gradient(x)
    np.testing.assert_array_equal(before[~valid], 0.0)
    assert np.abs(before[valid]).max() > 0.0
    for value in (1e30, np.nan):
        np.testing.assert_array_equal(gradient(_changed(x, ~valid, value)), before)


def test_gradients_of_earlier_tokens_pass_by_later_ones(path, x):
    first = 2
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = tf.reduce_sum(tf.square(path(inputs, use_causal_mask=True)[:, :first]))
    gradient = tape.gradient(total, inputs)
    np.testing.assert_array_equal(gradient[:, first:], 0.0)
    assert np.abs(gradient[:, :first]).max() > 0.0


def test_weights_learn_nothing_from_padding():
    layer = Case(cap="both", dtype="float32").layer()
    x = np.random.default_rng(0).normal(size=(1, LENGTH, FEATURES)).astype("float32")
    valid = np.array([[True, True, False, True, False]])
    gradients = []
    for value in PADDED:
        layer.warm_up()
        with tf.GradientTape() as tape:
            y = layer(_changed(x, ~valid, value), query_mask=valid, training=True)
            total = tf.reduce_sum(tf.square(y))
        gradients.append(tape.gradient(total, [w.value for w in layer.trainable_variables]))
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_hidden_tokens_reach_nobody_who_may_not_see_them(path, x):
    for call, hidden in (("pairs", 0), ("pairs per example", 2), ("pairs per head", 4)):
        pairs = Case(call=call).call_arguments()["attention_mask"].copy()
        pairs[..., hidden] = False
        others = np.arange(LENGTH) != hidden
        before = np.asarray(path(x, attention_mask=pairs))
        after = np.asarray(path(_changed(x, np.s_[:, hidden], 3.0), attention_mask=pairs))
        # The first token is the origin of the distances: by rounding alone it reaches everybody.
        np.testing.assert_allclose(after[:, others], before[:, others], rtol=0, atol=2e-5)
        if hidden > 0:
            np.testing.assert_array_equal(after[:, others], before[:, others])


def test_a_window_hides_what_is_outside(x):
    layer = Case("window", dtype="float32").layer()
    before = np.asarray(layer(x))
    for moved in range(LENGTH):
        after = np.asarray(layer(_changed(x, np.s_[:, moved], 3.0)))
        far = np.abs(np.arange(LENGTH) - moved) >= 2
        np.testing.assert_allclose(after[:, far], before[:, far], rtol=0, atol=2e-5)
        assert not np.allclose(after[:, ~far], before[:, ~far])


def test_examples_do_not_meet(path, x):
    pairs = np.random.default_rng(1).random((BATCH, LENGTH, LENGTH)) < 0.5
    foreign = pairs.copy()
    foreign[1] = np.eye(LENGTH, dtype=bool)
    for calls in (
        ({}, {}),
        ({"use_causal_mask": True}, {"use_causal_mask": True}),
        # The cap may not know the masks of other examples either.
        ({"attention_mask": pairs}, {"attention_mask": foreign}),
    ):
        before = path(x, **calls[0])
        after = path(_changed(x, 1, np.nan), **calls[1])
        np.testing.assert_array_equal(after[0], before[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", ["plain", "window"])
@pytest.mark.parametrize("cap", [None, "spectral", "l2", "token", "linf", "both"])
def test_length_and_padding_do_not_change_common_tokens(cap, options, causal):
    case = Case(options, cap=cap)
    layer = case.layer(max_sequence_length=9)
    if cap != "both":
        layer.condense()
    x = np.random.default_rng(0).normal(size=(1, 9, FEATURES))
    expected = layer(x[:, :3], use_causal_mask=causal)
    for length in (4, 9):
        valid = np.arange(length)[None] < 3
        padded = layer(x[:, :length], use_causal_mask=causal, query_mask=valid)
        # float64: the mean of the tokens moves in its last digits.
        np.testing.assert_allclose(padded[:, :3], expected, atol=1e-13)
        if causal:
            longer = layer(x[:, :length], use_causal_mask=True)
            np.testing.assert_allclose(longer[:, :3], expected, atol=1e-13)


def test_padding_a_batch_further_changes_nothing_in_a_model():
    tokens = np.array([[3, 1, 2], [4, 5, 0]])
    inputs = keras.Input((None,), dtype="int32")
    y = keras.layers.Embedding(9, FEATURES, mask_zero=True)(inputs)
    layer = kl.L2MultiHeadAttention(2, 3, lipschitz_bound=0.3, max_sequence_length=16)
    model = keras.Model(inputs, layer(y))
    randomize(layer)
    short = model(tokens)
    graph = tf.function(model, input_signature=[tf.TensorSpec((None, None), "int32")])
    for extra in (1, 13):
        longer = graph(np.pad(tokens, ((0, 0), (0, extra))))
        np.testing.assert_allclose(longer[:, :3], short, atol=1e-6)
        np.testing.assert_array_equal(longer[:, 3:], 0.0)
