"""The iteration always converges, and acceleration helps where plain steps are slow."""

# The type checker takes variables assigned in a loop for `None`.
# pyright: reportOptionalMemberAccess=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_lipattn as kl
from keras_lipattn.layers import InversionError
from keras_lipattn.layers._fixed_point import example_norm, solve_fixed_point

TOKENS = FEATURES = 64
BLOCKS = 8


def contractions(rng):
    """Contractions with the constant 0.9 in the 2-norm, some of them adverse to extrapolation."""
    n = 12
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    shift = rng.normal(size=n)
    yield "rotation", lambda x: 0.9 * x @ rotation + shift
    yield "reflection", lambda x: -0.9 * x + shift
    yield "shear", lambda x: x @ np.diag(np.full(n - 1, 0.9), 1) + shift
    yield "kinks", lambda x: 0.9 * tf.abs(x @ rotation) - shift
    yield "sawtooth", lambda x: 0.9 * tf.abs(tf.math.floormod(x + shift, 2.0) - 1.0)
    yield "sine", lambda x: 0.09 * tf.sin(10.0 * x @ rotation) + shift
    yield "constant", lambda x: 0.0 * x + shift
    yield "far", lambda x: 0.9 * tf.abs(x) + 1e6


@pytest.mark.parametrize("acceleration", ["plain", "anderson"])
@pytest.mark.parametrize("name,step", list(contractions(np.random.default_rng(0))))
def test_every_contraction_is_solved_in_twice_the_guaranteed_steps(name, step, acceleration):
    start = tf.constant(np.random.default_rng(1).normal(size=(3, 12)))
    norm = example_norm("l2")
    first = float(tf.reduce_max(norm(step(start) - start) / norm(start)))
    tolerance = 1e-10
    guaranteed = int(np.ceil(np.log(max(first, 1.0) / tolerance) / -np.log(0.9)))

    @tf.function(autograph=False)
    def solve():
        return solve_fixed_point(
            step,
            start,
            contraction=0.9,
            norm=norm,
            tolerance=tolerance,
            stall_tolerance=tolerance,
            max_steps=2 * guaranteed + 2,
            acceleration=acceleration,
        )

    found = solve()
    assert found.converged.numpy().all()
    residual = norm(step(found.solution) - found.solution).numpy()
    np.testing.assert_allclose(residual, found.residual, rtol=1e-6, atol=1e-9)
    scale = np.maximum(norm(start), norm(found.solution))
    assert (residual <= tolerance * scale * (1.0 + 1e-6)).all()
    assert (found.steps.numpy() <= 2 * guaranteed + 2).all()


@pytest.mark.parametrize("acceleration", ["plain", "anderson"])
def test_examples_of_a_batch_are_independent(acceleration):
    rng = np.random.default_rng(2)
    matrix = 0.9 * np.linalg.qr(rng.normal(size=(6, 6)))[0]
    start = rng.normal(size=(4, 6))
    start[1] *= 1e8
    start[2] = np.nan

    def solve(start):
        return solve_fixed_point(
            lambda x: tf.sin(x @ matrix) + 1.0,
            tf.constant(start),
            contraction=0.9,
            norm=example_norm("l2"),
            tolerance=1e-12,
            stall_tolerance=1e-12,
            max_steps=300,
            acceleration=acceleration,
        )

    together = solve(start)
    assert together.converged.numpy().tolist() == [True, True, False, True]
    assert together.steps.numpy()[2] == 1
    for index in (0, 3):
        alone = solve(start[index : index + 1])
        np.testing.assert_allclose(alone.solution[0], together.solution[index], rtol=1e-12)
        assert int(alone.steps[0]) == int(together.steps[index])


def invertible_transformer(coefficient):
    """Attention and perceptrons; these are gradients of convex functions, which are slow."""
    layers = []
    for seed in range(BLOCKS):
        perceptron = keras.Sequential(
            [
                kl.SpectralDense(2 * FEATURES, activation="relu", spectral_norm=None),
                kl.SpectralDense(FEATURES, spectral_norm=None),
            ]
        )
        layers += [
            kl.InvertibleResidual(kl.L2MultiHeadAttention(4, 16), coefficient),
            kl.InvertibleResidual(perceptron, coefficient),
        ]
        layers[-1].build((None, TOKENS, FEATURES))
        kernel = keras.initializers.Orthogonal(seed=seed)((FEATURES, 2 * FEATURES))
        perceptron.layers[0].kernel.assign(kernel)
        perceptron.layers[1].kernel.assign(ops.transpose(kernel))
    stack = kl.InvertibleSequential(layers)
    stack.build((None, TOKENS, FEATURES))
    return stack


def test_eight_blocks_are_inverted_in_single_precision_with_half_the_steps():
    stack = invertible_transformer(0.9)
    x = np.random.default_rng(0).normal(size=(1, TOKENS, FEATURES)).astype("float32")
    y = stack(x)
    steps = {}
    for acceleration in ("plain", "anderson"):
        # Run eagerly, it raises unless it converges, and tracing 32 loops takes longer.
        found = stack.inverse(y, acceleration=acceleration)
        assert np.abs(found.solution.numpy() - x).max() <= 1e-5
        steps[acceleration] = int(found.steps[0])
    assert 2 * steps["anderson"] <= steps["plain"]


def slow_layer():
    """A layer whose plain iteration converges only by the factor 0.99 per step, and inputs."""
    keras.utils.set_random_seed(0)
    dense = kl.SpectralDense(4, kernel_initializer="identity", spectral_norm=None)
    x = np.random.default_rng(0).normal(size=(4, 8, 4)).astype("float32")
    return kl.InvertibleResidual(dense, coefficient=0.99), x


def test_ten_accelerated_steps_solve_what_a_hundred_plain_steps_do_not():
    layer, x = slow_layer()
    y = layer(x)
    with pytest.raises(InversionError, match='pass `acceleration="anderson"`'):
        layer.inverse(y, max_steps=100)
    found = layer.inverse(y, acceleration="anderson")
    assert (found.steps.numpy() <= 10).all()
    np.testing.assert_allclose(found.solution, x, rtol=0, atol=1e-5)


def test_plain_iteration_ends_where_rounding_errors_stop_it():
    layer, x = slow_layer()
    # Rounding errors keep the residual above 4 of them here, so a strict tolerance would fail.
    found = tf.function(layer.inverse, autograph=False)(layer(x))
    assert found.converged.numpy().all()
    np.testing.assert_allclose(found.solution, x, rtol=0, atol=1e-4)
