"""Caps while a layer is pushed against them: kernels, outputs and Jacobians, step after step."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportOptionalOperand=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import bounds_cases
from helpers.layer_cases import CAPS, FEATURES, LENGTH, Case, randomise, running_matrices

from keras_lipattn import L2MultiHeadAttention, SpectralDense
from keras_lipattn.linalg import operator_norm
from keras_lipattn.linalg.power import ScaledMatrix

STEPS = 50
SLACK = 1.0 + 1e-6


def _pushed(layer, x, target):
    """One optimiser step away from small weights, as a graph."""
    optimizer = keras.optimizers.Adam(0.2)
    weights = layer.trainable_variables
    optimizer.build(weights)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(layer(x, training=True) - target))
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        optimizer.apply_gradients(zip(gradients, weights, strict=True))

    return step


@pytest.mark.parametrize("cap", ["spectral", "both"])
def test_no_step_pushes_a_layer_over_its_caps(cap):
    layer = Case(cap=cap, dtype="float32").layer(scale=0.1)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(8, LENGTH, FEATURES)), "float32")
    step = _pushed(layer, x, 9.0 * tf.sign(x))
    graph = tf.function(lambda: running_matrices(layer))
    full = np.ones((LENGTH, LENGTH), bool)
    witness = bounds_cases.inputs(LENGTH, FEATURES, rng)[2:9:3]
    for index in range(STEPS):
        step()
        if index == STEPS // 2:
            layer.condense()
        b, c = (np.asarray(matrix, np.float64) for matrix in graph())
        if layer.spectral_norm is not None:
            assert operator_norm(b) * layer.key_dim**0.25 <= layer.spectral_norm * SLACK
        heads = b.reshape(FEATURES, layer.num_heads, layer.key_dim).transpose(1, 0, 2)
        out = c.reshape(layer.num_heads, layer.key_dim, -1)
        if layer.lipschitz_bound is not None:
            for tokens in witness:
                found = bounds_cases.jacobian_norm(tokens, heads, out, full, layer.lipschitz_norm)
                assert found <= layer.lipschitz_bound * SLACK
    # Pushed hard enough to need the caps.
    assert min(operator_norm(np.reshape(k, (k.shape[0], -1))) for k in layer.kernels[:2]) > 1.0


def test_every_kernel_is_capped_as_the_matrix_it_is():
    layer = Case("value dim", cap="spectral", dtype="float32").layer(scale=2.0)
    for remembered in (False, True):
        if remembered:
            layer.condense()
        kernels = layer._graph_kernels()
        factors = layer._cap_factors(kernels, layer._norms_for(kernels, training=False), keras.ops)
        capped = [kernel * factor for kernel, factor in zip(kernels, factors, strict=True)]
        query, value, output = layer.by_head(capped, keras.ops)
        beside = (np.reshape(np.transpose(k, (1, 0, 2)), (FEATURES, -1)) for k in (query, value))
        for matrix in (*beside, np.reshape(output, (-1, FEATURES))):
            norm = operator_norm(matrix)
            assert norm <= layer.spectral_norm * SLACK
            # Gram iteration is close by.
            assert norm >= layer.spectral_norm * (1.0 - 2e-3)


@pytest.mark.parametrize("cap", [1e-6, 0.5, 3.0])
def test_a_dense_layer_stays_under_its_cap_while_pushed(cap):
    layer = SpectralDense(6, spectral_norm=cap)
    x = tf.random.normal((16, 5))
    layer(x)
    step = _pushed(layer, x, 100.0 * tf.sign(tf.random.normal((16, 6))))
    read = tf.function(lambda: layer.effective_weights().output)
    for _ in range(STEPS):
        step()
        assert operator_norm(read()) <= cap * SLACK
        assert layer.lipschitz().value <= cap
    assert operator_norm(layer.kernel) > cap
    assert operator_norm(read()) >= cap * (1.0 - 2e-3)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_caps_hold_right_after_weights_are_set(norm, dtype):
    layer = L2MultiHeadAttention(
        2, 3, spectral_norm=2.0, lipschitz_bound=0.5, lipschitz_norm=norm, dtype=dtype
    )
    layer.build((None, LENGTH, FEATURES))
    rng = np.random.default_rng(0)
    graph = tf.function(lambda: running_matrices(layer))
    for scale in (1e-9, 1e-3, 1.0, 1e4) if "float16" in dtype else (1e-30, 1e-9, 1.0, 1e9, 1e30):
        # Running vectors and everything else too: nothing of it may matter.
        layer.set_weights([rng.normal(size=w.shape) * scale for w in layer.weights])
        b, c = (np.asarray(keras.ops.cast(m, "float32"), np.float64) for m in graph())
        assert operator_norm(b) * layer.key_dim**0.25 <= 2.0 * SLACK
        assert layer.lipschitz(norm=norm).value <= 0.5
        heads = b.reshape(FEATURES, 2, 3).transpose(1, 0, 2)
        out = c.reshape(2, 3, -1)
        for x in bounds_cases.inputs(LENGTH, FEATURES, rng)[::3]:
            full = np.ones((LENGTH, LENGTH), bool)
            assert bounds_cases.jacobian_norm(x, heads, out, full, norm) <= 0.5 * SLACK


@pytest.mark.parametrize("cap", CAPS)
def test_weights_under_their_caps_run_untouched(cap):
    case = Case(cap=cap, dtype="float32")
    loose = {name: 1e6 for name in ("spectral_norm", "lipschitz_bound") if name in case.constructor}
    layer, free = case.layer(**loose), Case(dtype="float32").layer()
    x = case.inputs()
    for training in (False, True):
        np.testing.assert_array_equal(layer(x, training=training), free(x, training=training))
    layer.condense()
    np.testing.assert_array_equal(layer(x), free(x))


def _leading_vectors(layer):
    weights = layer.host_weights().exact
    matrices = layer._operators(layer.host_kernels(), np)
    for norm in ("l2", "token", "linf"):
        matrices |= layer.matrices(weights, norm, np)
    return {
        name: np.linalg.svd(m.formed(np) if isinstance(m, ScaledMatrix) else m)[2][..., 0, :]
        for name, m in matrices.items()
    }


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_gradients_flow_through_the_caps(cap, mode):
    # One head: its scaling does not matter, and the formula of the graph is exact.
    case = Case("one head", cap=cap)
    layer, x = case.layer(scale=1.0), tf.constant(case.inputs())
    cotangent = np.random.default_rng(4).normal(size=layer(x).shape)
    if mode == "training":
        # Running norms are exact once their vectors have converged.
        for name, norm in _leading_vectors(layer).items():
            layer._vectors[name].assign(norm)
    kernels = layer.kernels
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x, training=mode == "training") * cotangent)
    gradients = tape.gradient(total, [kernel.value for kernel in kernels])
    rng = np.random.default_rng(5)
    for kernel, gradient in zip(kernels, gradients, strict=True):
        start, direction = np.copy(kernel), rng.normal(size=kernel.shape)
        ends = []
        for step in (1e-6, -1e-6):
            kernel.assign(start + step * direction)
            layer.condense()
            ends.append(float(tf.reduce_sum(layer(x) * cotangent)))
        kernel.assign(start)
        slope = (ends[0] - ends[1]) / 2e-6
        # Allowances of 1e-6 on exact norms; vectors kept in float32; Gram iteration weighs the
        # second singular value in, where it is close.
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.vdot(gradient, direction) - slope) <= 1e-4 * max(scale, 1e-3)


def test_a_cap_is_the_same_for_every_mask_of_padding_and_every_length():
    layer = L2MultiHeadAttention(2, 3, lipschitz_bound=0.5, max_sequence_length=12, dtype="float64")
    layer.build((None, None, FEATURES))
    randomise(layer, scale=2.0)
    # The map of one token is linear: its size shows the factor.
    x = np.random.default_rng(0).normal(size=(1, 12, FEATURES))
    single = layer(x[:, :1]) - layer.output_bias
    alone = layer(x, query_mask=np.eye(1, 12, dtype=bool))[:, :1] - layer.output_bias
    np.testing.assert_allclose(alone, single, rtol=1e-12)
    identity = layer(x, attention_mask=np.eye(12, dtype=bool))[:, :1] - layer.output_bias
    # A constant mask is bounded by its degrees: tokens that see nobody need less shrinking.
    assert np.abs(identity).max() > 2.0 * np.abs(single).max()
