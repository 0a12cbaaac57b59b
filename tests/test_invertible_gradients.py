"""Derivatives through the inverse are those of the implicit function."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportCallIssue=false

import numpy as np
import pytest
import tensorflow as tf
from helpers.invertible_cases import BY_NAME


def loss_of_inverse(layer, y, mask, weights):
    return tf.reduce_sum(weights * layer.inverse(y, mask).solution)


@pytest.mark.parametrize("name", ["padded", "token norm", "vector", "transformer"])
def test_gradient_through_the_inverse_is_the_difference_quotient(name):
    layer, x, mask = BY_NAME[name].build()
    rng = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        # Norms are smooth where the largest singular values are distinct.
        variable.assign_add(0.3 * rng.normal(size=variable.shape))
    y = tf.constant(np.asarray(layer(x, mask=mask)))
    weights = rng.normal(size=x.shape)
    with tf.GradientTape() as tape:
        tape.watch(y)
        loss = loss_of_inverse(layer, y, mask, weights)
    variables = layer.trainable_variables
    starts = [variable.numpy() for variable in variables]
    gradients = tape.gradient(loss, [y, *(variable.value for variable in variables)])
    directions = [rng.normal(size=gradient.shape) for gradient in gradients]

    def loss_at(length, by_input, by_weights):
        for variable, start, direction in zip(variables, starts, directions[1:], strict=True):
            variable.assign(start + by_weights * length * direction)
        return float(loss_of_inverse(layer, y + by_input * length * directions[0], mask, weights))

    slopes = [float(tf.reduce_sum(g * d)) for g, d in zip(gradients, directions, strict=True)]
    # Central differences: an error of step^2 = 1e-10, and of rounding / step = 1e-10, times the
    # high derivatives of the Gram bound.
    step = 1e-5
    for slope, way in ((slopes[0], (1, 0)), (sum(slopes[1:]), (0, 1))):
        quotient = (loss_at(step, *way) - loss_at(-step, *way)) / (2 * step)
        assert slope == pytest.approx(quotient, rel=1e-5)


def test_gradient_through_the_inverse_is_the_same_in_a_graph():
    layer, x, mask = BY_NAME["perceptron"].build()

    def gradients(y):
        with tf.GradientTape() as tape:
            tape.watch(y)
            loss = tf.reduce_sum(tf.square(layer.inverse(y, mask).solution))
        return tape.gradient(loss, [y, *(variable.value for variable in layer.trainable_variables)])

    y = tf.constant(2.0 * x)
    for eager, graph in zip(gradients(y), tf.function(gradients, autograph=False)(y), strict=True):
        np.testing.assert_allclose(eager, graph, rtol=1e-9, atol=1e-12)
