"""Log-determinants: the truncation error is certified, the random ones are unbiased."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.invertible_cases import BY_NAME
from keras import ops

import keras_lipattn as kl
from keras_lipattn.layers._log_determinant import terms_for, truncation_error

DRAWS = 1000
ESTIMATORS = {
    "roulette": dict(method="roulette", num_terms=2),
    "roulette of two probes": dict(method="roulette", num_terms=1, num_probes=2),
    # The omitted terms are smaller than the standard error of the mean.
    "probes": dict(method="series", num_terms=60, num_probes=1),
}


def hard_layer():
    """A layer whose Jacobian is close to its constant, so that all terms of the series matter."""
    layer, x, _ = BY_NAME["perceptron"].build()
    hard = kl.InvertibleResidual(layer.branch, coefficient=0.8, seed=11, dtype="float64")
    x = 0.3 * x[:1, :2]
    hard(x)
    return hard, x


@pytest.mark.parametrize("name", ["padded", "token norm", "perceptron", "transformer"])
def test_series_is_within_its_certified_truncation_error(name):
    layer, x, mask = BY_NAME[name].build()
    exact = layer.log_det_jacobian(x, mask).value
    for num_terms in (1, 2, 5, 20):
        series = layer.log_det_jacobian(x, mask, method="series", num_terms=num_terms)
        error = np.abs(ops.convert_to_numpy(series.value - exact))
        assert (error <= ops.convert_to_numpy(series.truncation_error)).all()


def test_series_takes_the_fewest_terms_for_its_tolerance():
    layer, x = hard_layer()
    exact = layer.log_det_jacobian(x)
    assert (ops.convert_to_numpy(exact.truncation_error) == 0.0).all()
    for tolerance in (1.0, 1e-3, 1e-6):
        series = layer.log_det_jacobian(x, method="series", tolerance=tolerance)
        assert float(series.truncation_error[0]) <= tolerance
        assert abs(float(series.value[0] - exact.value[0])) <= tolerance
    count = terms_for(40, 0.9, 1e-3)
    assert truncation_error(40, 0.9, count) <= 1e-3 < truncation_error(40, 0.9, count - 1)


def test_padding_is_not_counted_as_dimensions():
    layer, x, mask = BY_NAME["padded"].build()
    errors = layer.log_det_jacobian(x, mask, method="series", num_terms=2).truncation_error
    assert float(errors[0] / errors[1]) == pytest.approx(3 / 5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_and_their_gradients_are_unbiased(name):
    layer, x = hard_layer()
    point, variable = tf.constant(x), layer.trainable_variables[0]

    def value_and_gradients(**options):
        with tf.GradientTape() as tape:
            tape.watch(point)
            value = layer.log_det_jacobian(point, **options).value[0]
        return value, *tape.gradient(value, [point, variable.value])

    @tf.function(autograph=False)
    def draws():
        kinds = (tf.float64,) * 3
        return tf.map_fn(
            lambda _: value_and_gradients(**ESTIMATORS[name]),
            tf.range(DRAWS),
            fn_output_signature=kinds,
            parallel_iterations=1,
        )

    # One number is off by more than 3 standard errors once in 370 times, the worst of 20 entries
    # by more than 3.6 once in 160 times, of 64 by more than 4 once in 250 times.
    limits = (3.0, 3.6, 4.0)
    for values, exact, limit in zip(draws(), value_and_gradients(), limits, strict=True):
        values, exact = values.numpy(), exact.numpy()
        spread = values.std(axis=0, ddof=1) / np.sqrt(DRAWS)
        assert (spread > 0).all()
        assert (np.abs(values.mean(axis=0) - exact) <= limit * spread).all()


def test_gradient_of_the_exact_and_of_the_series_agree():
    layer, x = hard_layer()
    results = []
    for options in ({}, dict(method="series", num_terms=200)):
        with tf.GradientTape() as tape:
            point = tf.constant(x)
            tape.watch(point)
            value = layer.log_det_jacobian(point, **options).value
        # The last bias does not change the Jacobian.
        sources = [point, *(v.value for v in layer.trainable_variables[:-1])]
        results.append(tape.gradient(value, sources))
    for exact, series in zip(*results, strict=True):
        # 0.8**200 is below rounding.
        np.testing.assert_allclose(exact, series, rtol=1e-9, atol=1e-12)


def test_backward_pass_does_not_grow_with_the_number_of_terms():
    layer, x = hard_layer()

    def operations(num_terms):
        def gradient(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = layer.log_det_jacobian(
                    x, method="series", num_terms=num_terms, num_probes=1
                ).value
            return tape.gradient(value, x)

        graph = tf.function(gradient, autograph=False).get_concrete_function(tf.constant(x)).graph
        kinds = [operation.type for operation in graph.get_operations()]
        # A recorded loop stores the values of each iteration in tensor lists.
        return len(kinds), sum("TensorList" in kind for kind in kinds)

    few, many = operations(2), operations(50)
    assert few == many
    assert few[1] == 0


def test_draws_differ_and_a_seed_repeats_them():
    first, x = hard_layer()
    second, _ = hard_layer()
    draws = [float(first.log_det_jacobian(x, method="roulette").value[0]) for _ in range(3)]
    again = [float(second.log_det_jacobian(x, method="roulette").value[0]) for _ in range(3)]
    assert len(set(draws)) == 3
    assert draws == again


def test_change_of_variables_integrates_to_one():
    # The density of y = layer(x) for standard normal x, on a grid of the plane.
    keras.utils.set_random_seed(2)
    layer, _, _ = BY_NAME["vector"].build("float64")
    flow = kl.InvertibleResidual(
        type(layer.branch)(2, activation="tanh", spectral_norm=None, dtype="float64"),
        dtype="float64",
    )
    axis = np.linspace(-8.0, 8.0, 81)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    flow(grid)
    x = ops.convert_to_numpy(flow.inverse(grid).solution)
    log_density = -0.5 * (x**2).sum(1) - np.log(2 * np.pi)
    log_density -= ops.convert_to_numpy(flow.log_det_jacobian(x).value)
    total = np.exp(log_density).sum() * (axis[1] - axis[0]) ** 2
    # The rule of rectangles is exact to many digits for a smooth density inside the grid.
    assert total == pytest.approx(1.0, abs=1e-4)
