"""Caps hold at inference for whatever weights are loaded, and change nothing they need not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import running_matrices

import keras_lipattn as kl
from keras_lipattn.bounds import certified_layer_bound

LENGTH, FEATURES, HEADS, KEY_DIM = 6, 8, 2, 4
CAP = 0.5
# A cap aims a millionth below itself and its matrices are rounded to float32.
SLACK = 1.0 + 1e-6
_rng = np.random.default_rng(3)


def _capped(norm="l2", **options):
    layer = kl.L2MultiHeadAttention(
        HEADS, KEY_DIM, lipschitz_bound=CAP, lipschitz_norm=norm, **options
    )
    layer.build((None, LENGTH, FEATURES))
    return layer


def _running_matrices(layer, mask="full"):
    """Function that returns the matrices that the inference graph multiplies with."""
    return tf.function(lambda: running_matrices(layer, mask))


def _bound_of(matrices, norm, mask="full"):
    b, c = matrices
    b = np.asarray(b, np.float64).reshape(FEATURES, HEADS, KEY_DIM).transpose(1, 0, 2)
    c = np.asarray(c, np.float64).reshape(HEADS, KEY_DIM, -1)
    return certified_layer_bound(b, c, norm=norm, tokens=LENGTH, mask=mask).value


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_a_cap_holds_after_every_optimiser_step(norm):
    layer = _capped(norm, spectral_norm=2.0)
    optimizer = keras.optimizers.Adam(0.3)
    optimizer.build(layer.trainable_variables)
    x = tf.constant(_rng.normal(size=(16, LENGTH, FEATURES)), "float32")
    goal = tf.constant(_rng.normal(size=(16, LENGTH, FEATURES)) * 9.0, "float32")

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(layer(x, training=True) - goal))
        weights = [weight.value for weight in layer.trainable_variables]
        optimizer.apply_gradients(
            zip(tape.gradient(loss, weights), layer.trainable_variables, strict=True)
        )

    matrices = _running_matrices(layer)
    shrunk = 0
    for index in range(50):
        step()
        if index == 25:
            # What was remembered of one step must not count for the next.
            layer.condense()
        bound = _bound_of(matrices(), norm)
        assert bound <= CAP * SLACK
        shrunk += bound > 0.9 * CAP * (0.4 if norm == "linf" else 1.0)
    # The cap was at work, or nothing was tested.
    assert shrunk > 25


@pytest.mark.parametrize("condense", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e9])
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_a_cap_holds_right_after_weights_are_set(norm, scale, condense):
    layer = _capped(norm)
    layer.set_weights([_rng.normal(size=w.shape) * scale for w in layer.weights])
    if condense:
        layer.condense()
    for mask in ("full", "causal", "any"):
        matrices = running_matrices(layer, mask)
        assert _bound_of(matrices, norm, mask) <= CAP * SLACK


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_the_jacobian_of_a_capped_layer_stays_under_its_cap(norm):
    layer = _capped(norm)
    layer.set_weights([_rng.normal(size=w.shape) * 2.0 for w in layer.weights])
    for scale in (0.1, 1.0):
        x = tf.constant(_rng.normal(size=(1, LENGTH, FEATURES)) * scale, "float32")
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        jacobian = tape.jacobian(y, x).numpy().astype(np.float64)[0, :, :, 0]
        rows = jacobian.reshape(LENGTH * FEATURES, -1)
        if norm == "l2":
            measured = np.linalg.norm(rows, 2)
        elif norm == "linf":
            measured = np.abs(rows).sum(axis=1).max()
        else:
            # A lower bound: every token moves along its own best direction for one row.
            blocks = jacobian.transpose(0, 2, 1, 3)
            directions = [np.linalg.svd(b)[0][:, 0] for row in blocks for b in row]
            measured = max(
                np.linalg.norm(np.einsum("jab,a->jb", row, u), axis=1).sum()
                for row in blocks
                for u in directions
            )
        assert measured <= CAP * (1.0 + 1e-4)  # float32 derivatives


def test_weights_under_their_cap_run_as_they_are():
    free = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    free.build((None, LENGTH, FEATURES))
    bound = free.lipschitz()
    sizes = [
        np.linalg.norm(np.reshape(k.numpy(), s), 2)
        for k, s in zip(
            free.kernels, [(FEATURES, -1), (FEATURES, -1), (HEADS * KEY_DIM, -1)], strict=True
        )
    ]
    capped = kl.L2MultiHeadAttention(
        HEADS, KEY_DIM, spectral_norm=1.1 * max(sizes), lipschitz_bound=1.1 * bound.value
    )
    capped.build((None, LENGTH, FEATURES))
    capped.set_weights(free.get_weights())
    x = _rng.normal(size=(2, LENGTH, FEATURES)).astype("float32")
    np.testing.assert_array_equal(capped(x), free(x))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_length_do_not_change_a_capped_layer(causal):
    layer = _capped(max_sequence_length=20)
    layer.set_weights([3.0 * _rng.normal(size=w.shape) for w in layer.weights])
    x = _rng.normal(size=(2, 4, FEATURES)).astype("float32")
    expected = layer(x, use_causal_mask=causal)
    size = max(1.0, float(tf.reduce_max(abs(expected))))
    for length in (5, 12, 20):
        padded = np.full((2, length, FEATURES), np.nan, "float32")
        padded[:, :4] = x
        mask = np.broadcast_to(np.arange(length) < 4, (2, length))
        found = layer(padded, query_mask=mask, use_causal_mask=causal)
        np.testing.assert_allclose(found[:, :4], expected, atol=1e-5 * size)
        np.testing.assert_array_equal(found[:, 4:], 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: kl.SpectralDense(5, spectral_norm=CAP),
        lambda: kl.SpectralDense(5, spectral_norm=CAP, dtype="mixed_bfloat16"),
    ],
)
def test_the_kernel_of_a_dense_layer_stays_under_its_cap(make):
    layer = make()
    layer.build((None, FEATURES))
    for scale in (1e-3, 1.0, 1e3, 1e9):
        layer.set_weights([_rng.normal(size=w.shape) * scale for w in layer.weights])
        origin = np.asarray(layer(np.zeros((1, FEATURES), "float32")), np.float64)
        kernel = np.asarray(layer(np.eye(FEATURES, dtype="float32")), np.float64) - origin
        layer.bias.assign(np.zeros(5))
        kernel = np.asarray(layer(np.eye(FEATURES, dtype="float32")), np.float64)
        assert np.linalg.norm(kernel, 2) <= CAP * SLACK
        assert layer.lipschitz().value <= CAP * SLACK


def test_the_gradient_of_a_capped_layer_is_that_of_the_capped_function():
    layer = kl.SpectralDense(5, spectral_norm=CAP, use_bias=False, dtype="float64")
    layer.build((None, FEATURES))
    x = tf.constant(_rng.normal(size=(3, FEATURES)))
    kernel = layer.kernel.numpy()

    def loss(value):
        return float(np.sum((x.numpy() @ value * min(1.0, CAP / np.linalg.norm(value, 2))) ** 3))

    for _ in range(200):
        layer(x, training=True)  # the running vector converges
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(layer(x, training=True) ** 3)
    gradient = tape.gradient(y, layer.kernel.value).numpy()
    direction = _rng.normal(size=kernel.shape)
    h = 1e-6
    slope = (loss(kernel + h * direction) - loss(kernel - h * direction)) / (2.0 * h)
    # The cap aims 1e-6 below itself; central differences lose about as much.
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)
