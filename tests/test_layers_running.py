"""Running norms, the running bound and the penalty: made in training, never at inference."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportCallIssue=false

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import CAPS, FEATURES, LENGTH, Case, randomize

import keras_lipattn as kl
from keras_lipattn.layers import Tracking

VECTORS = {
    kl.L2MultiHeadAttention: {
        "query_vector": (6,),
        "value_vector": (6,),
        "output_vector": (4,),
        "concatenated_query_vector": (6,),
        "stacked_output_vector": (4,),
        "head_query_vector": (2, 3),
    },
    kl.SpectralDense: {"kernel_vector": (3,)},
    kl.OrthogonalDense: {"kernel_vector": (3,)},
    kl.NormalizedDense: {"kernel_vector": (3,)},
}
SCALARS = ("running_bound", "penalty_coefficient", "penalty_log_target")


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES))


def _layers(dtype="float64"):
    """One of each layer, in every way of capping it."""
    for cap in (None, *CAPS):
        yield Case(cap=cap, dtype=dtype).layer()
    for norm in (None, 0.5):
        dense = kl.SpectralDense(3, spectral_norm=norm, dtype=dtype)
        dense.build((2, LENGTH, FEATURES))
        randomize(dense)
        yield dense
    for make in (kl.OrthogonalDense, kl.NormalizedDense):
        dense = make(3, dtype=dtype)
        dense.build((2, LENGTH, FEATURES))
        randomize(dense)
        yield dense


def _converge(layer, x, steps=40):
    """Calls the layer in training many times over."""

    @tf.function
    def train():
        for _ in tf.range(steps):
            layer(x, training=True)

    train()
    layer._clear_losses()


def _vectors(layer):
    return {w.name: np.copy(w) for w in layer.non_trainable_weights if w.name.endswith("_vector")}


@pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16"])
def test_whatever_the_options_the_state_is_there(dtype):
    for layer in _layers(dtype):
        weights = {w.name: w for w in layer.non_trainable_weights}
        shapes = VECTORS[type(layer)]
        assert set(weights) == {*shapes, *SCALARS}
        for name, shape in shapes.items():
            assert tuple(weights[name].shape) == shape
            np.testing.assert_allclose(np.linalg.norm(weights[name], axis=-1), 1.0, rtol=1e-5)
        assert all(weight.dtype == "float32" for weight in weights.values())


def test_vectors_move_in_training_and_only_where_they_are_needed(x):
    for layer in _layers():
        start = _vectors(layer)
        layer(x)
        layer(x, training=False)
        capped = getattr(layer, "lipschitz_bound", None) or layer.spectral_norm
        assert _same(start, _vectors(layer))
        layer(x, training=True)
        assert _same(start, _vectors(layer)) == (capped is None)
        layer.tracking = Tracking()
        layer(x)
        before = _vectors(layer)
        layer(x, training=True)
        layer.warm_up()
        assert not _same(before, _vectors(layer))
        layer.tracking = None


def _same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_the_running_bound_approaches_the_certified_one(x, norm):
    for layer in _layers():
        exact = layer.lipschitz(norm=norm).value
        layer.tracking = Tracking(norm=norm)
        layer(x, training=True)
        cold = float(layer.running_bound)
        _converge(layer, x)
        warm = float(layer.running_bound)
        layer.tracking = None
        # One scaling of the heads instead of the best one: never smaller, and by 20 % at most here.
        # The allowances of the caps, 1e-5 at most, are on one side only.
        assert exact * (1.0 - 1e-5) <= warm <= 1.2 * exact
        if norm != "linf" and not layer.has_caps:
            # Lower bounds of all norms: from below. (A cap that sees too little lets through more.)
            assert cold <= warm * (1.0 + 1e-6)


def test_the_running_bound_follows_the_length_it_is_asked_for(x):
    layer = Case().layer()
    values = []
    for length in (2, None, 50):
        layer.tracking = Tracking(sequence_length=length)
        _converge(layer, x)
        values.append(float(layer.running_bound))
    assert values == sorted(values)
    layer.tracking = None
    free = kl.L2MultiHeadAttention(2, 3)
    model = keras.Model(inputs := keras.Input((None, FEATURES)), free(inputs))
    free.tracking = Tracking()
    with pytest.raises(ValueError, match=r"needs a number of tokens.*an input of unknown length"):
        tf.function(model)(x, training=True)


def test_vectors_recover_from_kernels_of_zeros_and_nan(x):
    dense = [layer for layer in _layers() if isinstance(layer, kl.SpectralDense)]
    for layer in (Case().layer(), Case(cap="both").layer(), *dense):
        layer.tracking = Tracking(penalize=True)
        kernels = [np.copy(kernel) for kernel in layer.kernels]
        for broken in (0.0, np.nan):
            for kernel in layer.kernels:
                kernel.assign(np.full(kernel.shape, broken))
            with tf.GradientTape() as tape:
                y = tf.reduce_sum(layer(x, training=True))
                # Losses come in Keras' own float type, for `fit` to add up.
                y += tf.cast(sum(layer.losses), y.dtype)
            gradients = tape.gradient(y, [kernel.value for kernel in layer.kernels])
            if broken == 0.0:
                assert all(np.isfinite(gradient).all() for gradient in gradients)
            for kernel, value in zip(layer.kernels, kernels, strict=True):
                kernel.assign(value)
            _converge(layer, x)
            bound = layer.lipschitz().value
            assert bound * (1.0 - 1e-4) <= float(layer.running_bound) <= 1.2 * bound
        layer.tracking = None


def test_warming_up_needs_no_training_step(x):
    for layer in _layers():
        randomize(layer, seed=5)
        layer.warm_up()
        layer.tracking = Tracking()
        layer(x, training=True)
        layer.tracking = None
        bound = layer.lipschitz().value
        # Thirty power steps on a random matrix of side six.
        assert bound * 0.99 <= float(layer.running_bound) <= 1.2 * bound


def test_the_penalty_is_the_hinge_of_the_logarithm_in_training_only(x):
    for layer in _layers():
        layer(x, training=True)
        assert layer.losses == []
        layer.tracking = Tracking(penalize=True)
        layer.penalty_coefficient.assign(3.0)
        for target in (-1.0, 50.0):
            layer.penalty_log_target.assign(target)
            layer(x)
            assert layer.losses == []
            layer(x, training=True)
            (loss,) = layer.losses
            expected = 3.0 * max(0.0, math.log(float(layer.running_bound)) - target)
            # The bound is kept in float32.
            assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            layer._clear_losses()
        layer.tracking = Tracking(penalize=False)
        layer(x, training=True)
        assert layer.losses == []
        layer.tracking = None


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_the_penalty_lowers_the_certified_bound(x, norm):
    for layer in (Case().layer(), next(d for d in _layers() if isinstance(d, kl.SpectralDense))):
        before = layer.lipschitz(norm=norm).value
        layer.tracking = Tracking(norm=norm, penalize=True)
        layer.penalty_coefficient.assign(1.0)
        layer.penalty_log_target.assign(math.log(before / 2.0))
        optimizer = keras.optimizers.SGD(0.02)
        optimizer.build(layer.kernels)

        @tf.function
        def step(layer=layer, optimizer=optimizer):
            with tf.GradientTape() as tape:
                layer(x, training=True)
                (loss,) = layer.losses
            kernels = [kernel.value for kernel in layer.kernels]
            optimizer.apply_gradients(zip(tape.gradient(loss, kernels), layer.kernels, strict=True))

        for _ in range(60):
            step()
        layer.tracking = None
        after = layer.lipschitz(norm=norm).value
        # Down to the target, where it stops.
        assert 0.4 * before < after < 0.6 * before


def test_the_gradient_of_the_penalty_is_that_of_the_certified_logarithm(x):
    # One head: no scaling to choose, the formula of the graph is the certified one.
    for layer, norm in ((Case("one head").layer(), "l2"), (Case("one head").layer(), "token")):
        layer.tracking = Tracking(norm=norm, penalize=True)
        layer.penalty_coefficient.assign(1.0)
        layer.penalty_log_target.assign(-5.0)
        _converge(layer, x, steps=300)
        with tf.GradientTape() as tape:
            layer(x, training=True)
            (loss,) = layer.losses
        kernels = layer.kernels
        gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
        rng = np.random.default_rng(1)
        for kernel, gradient in zip(kernels, gradients, strict=True):
            start, direction = np.copy(kernel), rng.normal(size=kernel.shape)
            ends = []
            for step in (1e-5, -1e-5):
                kernel.assign(start + step * direction)
                ends.append(math.log(layer.lipschitz(norm=norm).value))
            kernel.assign(start)
            # Vectors are kept in float32, and the certificate rounds its constants to 1e-14.
            slope = (ends[0] - ends[1]) / 2e-5
            assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-4, abs=1e-6)
        layer.tracking = None


def test_a_layer_without_a_constant_is_recorded_and_not_penalized(x):
    layer = kl.SpectralDense(3, activation="exponential")
    layer.build(x.shape)
    layer.tracking = Tracking(penalize=True)
    layer.penalty_coefficient.assign(1.0)
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(layer(x, training=True))
    assert layer.losses == []
    assert math.isinf(float(layer.running_bound))
    assert np.isfinite(tape.gradient(y, layer.kernel.value)).all()


def test_tracking_takes_nothing_else():
    layer = kl.SpectralDense(3)
    with pytest.raises(ValueError, match="Received: True"):
        layer.tracking = True
