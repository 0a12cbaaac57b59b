"""Perceptrons: the constant of two linear maps with an activation between them."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_lipattn as kl
from keras_lipattn.bounds.activated_product import (
    activated_gap_constants,
    activated_product_constant,
)
from keras_lipattn.bounds.layer_constants import ACTIVATIONS, LEAST_SLOPES
from keras_lipattn.linalg import operator_norm

NORMS = ("l2", "token", "linf")


def kernels(rng, *shape):
    sizes = np.exp(rng.choice([0.0, 1.0, 4.0]) * rng.normal(size=shape[1]))
    return rng.normal(size=shape[:2]) * sizes, rng.normal(size=shape[1:])


def norm_of(matrix, norm):
    return np.abs(matrix).sum(axis=0).max() if norm == "linf" else np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-0.13, 1.13), (0.2, 1.0), (-2.0, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("norm", NORMS)
def test_no_diagonal_exceeds_the_constant(norm, slopes):
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1), (2, 7, 3), (5, 3, 4), (3, 40, 3)):
        for _ in range(6):
            before, after = kernels(rng, *shape)
            bound = activated_product_constant(before, after, slopes, norm)
            largest = max(map(abs, slopes))
            product = largest * norm_of(before, norm) * norm_of(after, norm)
            assert bound <= product * (1 + 1e-8)
            diagonal = rng.choice(slopes, size=shape[1])
            best = 0.0
            for _ in range(3):
                # The norm is convex in each slope: the maximum is at the ends.
                for entry in range(shape[1]):
                    values = []
                    for slope in slopes:
                        diagonal[entry] = slope
                        values.append(norm_of(before * diagonal @ after, norm))
                    diagonal[entry] = slopes[int(np.argmax(values))]
                    best = max(best, *values)
            assert best <= bound * (1 + 1e-9)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-0.13, 1.13), (-2.0, 0.5)])
@pytest.mark.parametrize("norm", NORMS)
def test_no_diagonal_exceeds_the_constant_of_a_pair(norm, slopes):
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 2), (2, 7, 3), (5, 3, 4)):
        for _ in range(6):
            before, after = kernels(rng, *shape)
            bounds = activated_gap_constants(before, after, slopes, norm)
            np.testing.assert_allclose(bounds, bounds.T, rtol=1e-12)
            assert (np.diag(bounds) == 0.0).all()
            for first, second in zip(*np.triu_indices(shape[2], 1), strict=True):
                gap = (after[:, first] - after[:, second])[:, None]
                largest = max(map(abs, slopes)) * norm_of(before, norm) * norm_of(gap, norm)
                assert bounds[first, second] <= largest * (1 + 1e-8)
                diagonal = rng.choice(slopes, size=(2000, shape[1]))
                found = max(norm_of(before * d @ gap, norm) for d in diagonal[:200])
                assert found <= bounds[first, second] * (1 + 1e-9)


def test_pairs_of_classes_use_the_perceptron_before_the_logits():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16,), dtype="float64")
    hidden = layers.Dense(64, "relu", dtype="float64")(inputs)
    model = keras.Model(inputs, layers.Dense(5, dtype="float64")(hidden))
    before, _, after, _ = (np.asarray(weight, np.float64) for weight in model.get_weights())
    rng = np.random.default_rng(0)
    for norm, order in (("l2", 2), ("linf", np.inf)):
        pairs = np.array(kl.certify(model, norm=norm).pairwise_constants)
        apart = np.linalg.norm(after[:, :, None] - after[:, None], order_of_gap(norm), axis=0)
        separate = norm_of(before, norm) * apart
        off = ~np.eye(5, dtype=bool)
        # The kernels next to each other without the activation between: 1.4 is typical.
        assert (pairs[off] < 0.9 * separate[off]).all()
        x = rng.normal(size=(3000, 16))
        step = 1e-4 * rng.normal(size=x.shape)
        moved = np.asarray(model(x + step)) - np.asarray(model(x))
        gaps = np.abs(moved[:, :, None] - moved[:, None])
        ratios = gaps / np.linalg.norm(step, order, axis=1)[:, None, None]
        assert (ratios.max(axis=0)[off] <= pairs[off] * (1 + 1e-6)).all()


def order_of_gap(norm):
    return 1 if norm == "linf" else 2


def test_sizes_of_kernels_do_not_overflow():
    rng = np.random.default_rng(0)
    before, after = kernels(rng, 3, 5, 4)
    bound = activated_product_constant(before, after, (0.0, 1.0), "l2")
    for size in (1e-200, 1e200):
        scaled = activated_product_constant(before * size, after / size, (0.0, 1.0), "l2")
        assert scaled == pytest.approx(bound, rel=1e-6)
    assert activated_product_constant(0.0 * before, after, (0.0, 1.0), "l2") == 0.0
    assert activated_product_constant(before * math.nan, after, (0.0, 1.0), "l2") == math.inf


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_least_slopes_are_below_every_difference_quotient(name):
    if name in ("linear", "softmax"):
        return
    x = np.linspace(-20.0, 20.0, 40_001)
    if name == "gelu_tanh":
        y = keras.activations.gelu(x, approximate=True)
    elif hasattr(keras.activations, name):
        y = getattr(keras.activations, name)(x)
    else:
        y = getattr(keras.ops, name)(x)
    quotients = np.diff(np.asarray(y, np.float64)) / np.diff(x)
    least = min(LEAST_SLOPES.get(name, 0.0), 0.0)
    # Rounding of the values.
    assert quotients.min() >= least - 1e-7
    if name in LEAST_SLOPES:
        assert quotients.min() <= least + 1e-3


def perceptron(width, hidden, activation, where):
    keras.utils.set_random_seed(0)
    options: dict[str, Any] = {"dtype": "float64"}
    inputs = keras.Input((3, width), dtype="float64")
    if where == "argument":
        x = layers.Dense(hidden, activation=activation, **options)(inputs)
    elif where == "layer":
        x = layers.Dense(hidden, **options)(inputs)
        x = layers.Activation(activation, **options)(x)
    else:
        x = kl.SpectralDense(hidden, spectral_norm=None, **options)(inputs)
        x = getattr(keras.activations, activation)(x)
    x = layers.Dropout(0.1, **options)(x)
    return keras.Model(inputs, layers.Dense(width, **options)(x))


@pytest.mark.parametrize("where", ["argument", "layer", "operation"])
@pytest.mark.parametrize(("activation", "most"), [("relu", 2.5), ("gelu", 2.95), ("tanh", 2.5)])
def test_certificates_of_perceptrons(activation, most, where):
    model = perceptron(64, 256, activation, where)
    before, after = (np.asarray(weight) for weight in model.weights if len(weight.shape) == 2)
    product = operator_norm(before) * operator_norm(after)
    for norm in ("l2", "token"):
        total = kl.certify(model, norm=norm).total
        assert total <= most < product
    slopes = (LEAST_SLOPES.get(activation, 0.0), ACTIVATIONS[activation])
    expected = activated_product_constant(before, after, slopes, "l2")
    assert kl.certify(model).total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.LeakyReLU(0.3),
        lambda: layers.LeakyReLU(2.5),
        lambda: layers.PReLU(alpha_initializer=keras.initializers.RandomNormal(0.0, 2.0)),
        lambda: layers.ELU(1.7),
        lambda: layers.ReLU(negative_slope=0.2, max_value=1.0),
        lambda: layers.Activation("mish"),
    ],
)
def test_no_difference_quotient_exceeds_the_certificate(layer):
    keras.utils.set_random_seed(1)
    options: dict[str, Any] = {"dtype": "float64"}
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="float64"),
            layers.Dense(3, kernel_initializer="random_normal", **options),
            layer(),
            layers.Dense(2, **options),
        ]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4)) * 10.0 ** rng.uniform(-1, 2, size=(500, 1))
    step = 1e-4 * rng.normal(size=x.shape)
    found = np.asarray(model(x + step)) - np.asarray(model(x))
    for norm, order in (("l2", 2), ("linf", np.inf)):
        total = kl.certify(model, norm=norm).total
        ratio = np.linalg.norm(found, order, axis=1) / np.linalg.norm(step, order, axis=1)
        assert 0.2 * total <= ratio.max() <= total * (1 + 1e-6)
