"""Caps hold in training and at inference for all weights, and change nothing they need not."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportOptionalOperand=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import bounds_cases
from helpers.layer_cases import CAPS, FEATURES, LENGTH, Case, randomise, running_matrices

import keras_lipattn as kl
from keras_lipattn.bounds import certified_layer_bound
from keras_lipattn.linalg import operator_norm
from keras_lipattn.linalg.power import ScaledMatrix

TOKENS, WIDTH, HEADS, KEY_DIM = 6, 8, 2, 4
CAP = 0.5
STEPS = 50
# A cap aims a millionth below itself and its matrices are rounded to float32.
SLACK = 1.0 + 1e-6
_rng = np.random.default_rng(3)


def _capped(norm="l2", **options):
    layer = kl.L2MultiHeadAttention(
        HEADS, KEY_DIM, lipschitz_bound=CAP, lipschitz_norm=norm, **options
    )
    layer.build((None, TOKENS, WIDTH))
    return layer


def _running_matrices(layer, mask="full"):
    """Function that returns the matrices that the inference graph multiplies with."""
    return tf.function(lambda: running_matrices(layer, mask))


def _bound_of(matrices, norm, mask="full"):
    b, c = matrices
    b = np.asarray(b, np.float64).reshape(WIDTH, HEADS, KEY_DIM).transpose(1, 0, 2)
    c = np.asarray(c, np.float64).reshape(HEADS, KEY_DIM, -1)
    return certified_layer_bound(b, c, norm=norm, tokens=TOKENS, mask=mask).value


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_a_cap_holds_after_every_optimizer_step(norm):
    layer = _capped(norm, spectral_norm=2.0)
    optimizer = keras.optimizers.Adam(0.3)
    optimizer.build(layer.trainable_variables)
    x = tf.constant(_rng.normal(size=(16, TOKENS, WIDTH)), "float32")
    goal = tf.constant(_rng.normal(size=(16, TOKENS, WIDTH)) * 9.0, "float32")

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
            # Norms stored after one step must not be used after the next.
            layer.condense()
        bound = _bound_of(matrices(), norm)
        assert bound <= CAP * SLACK
        shrunk += bound > 0.9 * CAP * (0.4 if norm == "linf" else 1.0)
    # The cap was active, or nothing was tested.
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
        x = tf.constant(_rng.normal(size=(1, TOKENS, WIDTH)) * scale, "float32")
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        jacobian = tape.jacobian(y, x).numpy().astype(np.float64)[0, :, :, 0]
        rows = jacobian.reshape(TOKENS * WIDTH, -1)
        if norm == "l2":
            measured = np.linalg.norm(rows, 2)
        elif norm == "linf":
            measured = np.abs(rows).sum(axis=1).max()
        else:
            # A lower bound: each token changes in the direction that is best for one row.
            blocks = jacobian.transpose(0, 2, 1, 3)
            directions = [np.linalg.svd(b)[0][:, 0] for row in blocks for b in row]
            measured = max(
                np.linalg.norm(np.einsum("jab,a->jb", row, u), axis=1).sum()
                for row in blocks
                for u in directions
            )
        assert measured <= CAP * (1.0 + 1e-4)  # float32 derivatives


def test_weights_under_their_cap_are_used_unchanged():
    free = kl.L2MultiHeadAttention(HEADS, KEY_DIM)
    free.build((None, TOKENS, WIDTH))
    bound = free.lipschitz()
    sizes = [
        np.linalg.norm(np.reshape(k.numpy(), s), 2)
        for k, s in zip(
            free.kernels, [(WIDTH, -1), (WIDTH, -1), (HEADS * KEY_DIM, -1)], strict=True
        )
    ]
    capped = kl.L2MultiHeadAttention(
        HEADS, KEY_DIM, spectral_norm=1.1 * max(sizes), lipschitz_bound=1.1 * bound.value
    )
    capped.build((None, TOKENS, WIDTH))
    capped.set_weights(free.get_weights())
    x = _rng.normal(size=(2, TOKENS, WIDTH)).astype("float32")
    np.testing.assert_array_equal(capped(x), free(x))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_length_do_not_change_a_capped_layer(causal):
    layer = _capped(max_sequence_length=20)
    layer.set_weights([3.0 * _rng.normal(size=w.shape) for w in layer.weights])
    x = _rng.normal(size=(2, 4, WIDTH)).astype("float32")
    expected = layer(x, use_causal_mask=causal)
    size = max(1.0, float(tf.reduce_max(abs(expected))))
    for length in (5, 12, 20):
        padded = np.full((2, length, WIDTH), np.nan, "float32")
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
    layer.build((None, WIDTH))
    for scale in (1e-3, 1.0, 1e3, 1e9):
        layer.set_weights([_rng.normal(size=w.shape) * scale for w in layer.weights])
        origin = np.asarray(layer(np.zeros((1, WIDTH), "float32")), np.float64)
        kernel = np.asarray(layer(np.eye(WIDTH, dtype="float32")), np.float64) - origin
        layer.bias.assign(np.zeros(5))
        kernel = np.asarray(layer(np.eye(WIDTH, dtype="float32")), np.float64)
        assert np.linalg.norm(kernel, 2) <= CAP * SLACK
        assert layer.lipschitz().value <= CAP * SLACK


def test_the_gradient_of_a_capped_layer_is_that_of_the_capped_function():
    layer = kl.SpectralDense(5, spectral_norm=CAP, use_bias=False, dtype="float64")
    layer.build((None, WIDTH))
    x = tf.constant(_rng.normal(size=(3, WIDTH)))
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


def _pushed(layer, x, target):
    """A graph of one optimizer step away from small weights."""
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
    # The caps were active.
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
        flat = (np.reshape(np.transpose(k, (1, 0, 2)), (FEATURES, -1)) for k in (query, value))
        for matrix in (*flat, np.reshape(output, (-1, FEATURES))):
            norm = operator_norm(matrix)
            assert norm <= layer.spectral_norm * SLACK
            # The norms of Gram iteration are close to the exact ones.
            assert norm >= layer.spectral_norm * (1.0 - 2e-3)


@pytest.mark.parametrize("cap", [1e-6, 0.5, 3.0])
def test_a_dense_layer_stays_under_its_cap_while_pushed(cap):
    layer = kl.SpectralDense(6, spectral_norm=cap)
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
def test_all_caps_hold_right_after_weights_are_set(norm, dtype):
    layer = kl.L2MultiHeadAttention(
        2, 3, spectral_norm=2.0, lipschitz_bound=0.5, lipschitz_norm=norm, dtype=dtype
    )
    layer.build((None, LENGTH, FEATURES))
    rng = np.random.default_rng(0)
    graph = tf.function(lambda: running_matrices(layer))
    for scale in (1e-9, 1e-3, 1.0, 1e4) if "float16" in dtype else (1e-30, 1e-9, 1.0, 1e9, 1e30):
        # The running vectors change too, which must have no effect.
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
def test_weights_under_all_caps_are_used_unchanged(cap):
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
    # With one head the scaling cancels, and the formula of the graph is exact.
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
        # Allowances of 1e-6 on exact norms; vectors stored in float32; Gram iteration includes
        # a part of the second singular value if it is close.
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.vdot(gradient, direction) - slope) <= 1e-4 * max(scale, 1e-3)


def test_a_cap_is_the_same_for_every_mask_of_padding_and_every_length():
    layer = kl.L2MultiHeadAttention(
        2, 3, lipschitz_bound=0.5, max_sequence_length=12, dtype="float64"
    )
    layer.build((None, None, FEATURES))
    randomise(layer, scale=2.0)
    # The map of one token is linear: its size shows the factor.
    x = np.random.default_rng(0).normal(size=(1, 12, FEATURES))
    single = layer(x[:, :1]) - layer.output_bias
    alone = layer(x, query_mask=np.eye(1, 12, dtype=bool))[:, :1] - layer.output_bias
    np.testing.assert_allclose(alone, single, rtol=1e-12)
    identity = layer(x, attention_mask=np.eye(12, dtype=bool))[:, :1] - layer.output_bias
    # A constant mask is bounded by its degrees: tokens that attend only to themselves are
    # shrunk less.
    assert np.abs(identity).max() > 2.0 * np.abs(single).max()
