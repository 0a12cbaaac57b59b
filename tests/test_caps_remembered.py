"""The norms inference scales with: bounds for any weights, exact once remembered, never stale."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import CAPS, FEATURES, LENGTH, Case, randomize, running_matrices

import keras_lipattn as kl
from keras_lipattn.layers import lipschitz_layer
from keras_lipattn.layers._norms import ConvergedNorms

# Gram iteration overestimates each of the norms of these small matrices by less than this.
GRAM_SLACK = 2e-3


@pytest.fixture
def gram_used(monkeypatch):
    """Function that says whether a call used Gram iteration. For eager calls."""
    used = []

    class Spied(ConvergedNorms):
        def __init__(self):
            used.append(True)
            super().__init__()

    monkeypatch.setattr(lipschitz_layer, "ConvergedNorms", Spied)

    def asked(function):
        used.clear()
        function()
        return bool(used)

    return asked


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES))


CHANGES = {
    "assign": lambda layer, model, x: layer.output_kernel.assign(1.001 * layer.output_kernel),
    "one bit": lambda layer, model, x: layer.value_kernel.assign(
        np.nextafter(np.asarray(layer.value_kernel), np.inf)
    ),
    "optimizer": lambda layer, model, x: model.train_on_batch(x, x),
    "set_weights": lambda layer, model, x: layer.set_weights(
        [2.0 * np.asarray(w) for w in layer.weights]
    ),
    "load_weights": lambda layer, model, x: layer.load_own_variables(
        {str(i): np.asarray(w) for i, w in enumerate(Case(cap="both").layer(seed=9).weights)}
    ),
    "NaN": lambda layer, model, x: layer.query_kernel.assign(
        np.full(layer.query_kernel.shape, np.nan)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_weight_makes_the_memory_invalid(change, x, gram_used):
    layer = Case(cap="both").layer()
    inputs = keras.Input((LENGTH, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    assert gram_used(lambda: layer(x))
    layer.condense()
    assert not gram_used(lambda: layer(x))
    CHANGES[change](layer, model, x)
    assert gram_used(lambda: layer(x))
    # Nothing equals NaN, and nothing is remembered of it.
    assert gram_used(lambda: layer(x)) == (change == "NaN")
    layer.condense()
    assert gram_used(lambda: layer(x)) == (change == "NaN")


@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed_bfloat16", "mixed_float16"])
def test_the_memory_serves_every_precision(dtype, x, gram_used):
    for layer in (Case(cap="both", dtype=dtype).layer(), kl.SpectralDense(3, dtype=dtype)):
        assert gram_used(lambda layer=layer: layer(x))
        layer.condense()
        assert not gram_used(lambda layer=layer: layer(x))
        kernel = layer.kernels[0]
        before = np.copy(kernel)
        kernel.assign(2.0 * before)
        assert gram_used(lambda layer=layer: layer(x))
        # It knows one set of weights at a time, those of the last call.
        kernel.assign(before)
        assert gram_used(lambda layer=layer: layer(x))
        assert not gram_used(lambda layer=layer: layer(x))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_remembers_what_it_computed(x, jit_compile):
    """The second call gives bitwise what the first gave, from what the first left behind."""
    layer = Case(cap="both", dtype="float32").layer()
    graph = tf.function(layer, jit_compile=jit_compile)
    for seed in (8, 9):
        randomize(layer, seed=seed)
        first = graph(x)
        for snapshot, kernel in zip(layer._cache._snapshots, layer._graph_kernels(), strict=True):
            np.testing.assert_array_equal(snapshot, kernel)
        # Those of the three kernels; the others are of matrices under caps made from these.
        norms = np.asarray(layer._cache._value)[:3]
        np.testing.assert_array_equal(graph(x), first)
        layer.condense()
        exact = np.asarray(layer._cache._value)[:3]
        # A float32 rounding apart.
        assert (norms >= exact * (1.0 - 1e-6)).all()
        assert (norms <= exact * (1.0 + GRAM_SLACK)).all()


def test_derivatives_flow_through_what_is_remembered(x):
    """What a cap does to the output is part of the derivative, remembered norm or not."""
    layer = Case(cap="both").layer()

    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(x)) * np.arange(1.0, FEATURES + 1.0))
        return tape.gradient(loss, [w.value for w in layer.trainable_variables])

    fresh, remembered = gradients(), gradients()
    for one, two in zip(fresh, remembered, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-12)


def test_replicas_remember_each_for_themselves(x, two_cpus):
    strategy = tf.distribute.MirroredStrategy(two_cpus)
    with strategy.scope():
        inputs = keras.Input((LENGTH, FEATURES))
        model = keras.Model(inputs, Case(cap="both").layer()(inputs))
    again = [model.predict(x, verbose=0) for _ in range(3)]
    np.testing.assert_array_equal(again[0], again[1])
    np.testing.assert_array_equal(again[0], again[2])


def test_the_memory_is_checked_inside_graphs(x):
    layer = Case(cap="both").layer()
    graph = tf.function(layer)
    layer.condense()
    exact = graph(x)
    for seed in (8, 9):
        randomize(layer, seed=seed)
        after = graph(x)
        np.testing.assert_allclose(after, layer(x), rtol=0, atol=1e-12)
        assert not np.allclose(after, exact)


@pytest.mark.parametrize("cap", CAPS)
def test_unremembered_factors_are_smaller_but_hardly(cap):
    layer = Case(cap=cap).layer()

    def matrices():
        return [np.asarray(matrix) for matrix in running_matrices(layer)]

    loose = matrices()
    layer.condense()
    exact = matrices()
    for one, two in zip(loose, exact, strict=True):
        ratio = np.vdot(one, two) / np.vdot(two, two)
        np.testing.assert_allclose(one, ratio * two, atol=1e-12)
        # Exact norms are remembered with an allowance of 1e-6 each, and one is a product of three.
        assert 1.0 - 4 * GRAM_SLACK <= ratio <= 1.0 + 6e-6


def test_layers_without_caps_have_nothing_to_remember(x, gram_used):
    for layer in (Case().layer(), kl.SpectralDense(3, spectral_norm=None)):
        before = np.asarray(layer(x))
        layer.condense()
        assert not gram_used(lambda layer=layer: layer(x))
        np.testing.assert_array_equal(layer(x), before)


def test_remembering_adds_no_weights():
    layer = Case(cap="both").layer()
    names = [weight.name for weight in layer.weights]
    layer.condense()
    assert [weight.name for weight in layer.weights] == names
    assert not any(weight.trainable for weight in layer.non_trainable_weights)
