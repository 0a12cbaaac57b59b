"""SpectralDense, CenterNormalization and Residual: values, constants, and what any layer owes."""

# Weights that an option leaves out are `None` to the checker.
# pyright: reportOptionalMemberAccess=false

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import jacobians
from helpers.layer_cases import randomize

import keras_lipattn as kl
from keras_lipattn.layers._dense import DenseLayer
from keras_lipattn.linalg import operator_norm

NORMS = ("l2", "token", "linf")
TOKENS, FEATURES, UNITS = 3, 4, 5
DTYPES = ("float64", "float32", "mixed_bfloat16", "mixed_float16")
# Of the largest output: roundings of the inputs, the weights and the sums.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "mixed_bfloat16": 0.03, "mixed_float16": 0.005}
LAYERS = {
    "dense": lambda **k: kl.SpectralDense(UNITS, **k),
    "dense without cap": lambda **k: kl.SpectralDense(UNITS, spectral_norm=None, **k),
    "dense with all": lambda **k: kl.SpectralDense(
        UNITS,
        activation="tanh",
        use_bias=False,
        spectral_norm=0.5,
        kernel_initializer="orthogonal",
        kernel_regularizer="l2",
        kernel_constraint="non_neg",
        activity_regularizer="l1",
        **k,
    ),
    "orthogonal": lambda **k: kl.OrthogonalDense(UNITS, **k),
    "orthogonal, fewer units": lambda **k: kl.OrthogonalDense(
        2, activation="tanh", use_bias=False, **k
    ),
    "normalized": lambda **k: kl.NormalizedDense(UNITS, use_bias=False, **k),
    "center": lambda **k: kl.CenterNormalization(**k),
    "center without weights": lambda **k: kl.CenterNormalization(center=False, scale=False, **k),
    "center with initializers": lambda **k: kl.CenterNormalization(
        gamma_initializer="ones", beta_initializer=keras.initializers.Constant(2.0), **k
    ),
}


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, TOKENS, FEATURES))


def _kernel(layer):
    kernel = np.asarray(layer.kernel, np.float64)
    if isinstance(layer, kl.NormalizedDense):
        return kernel / np.linalg.norm(kernel, axis=0)
    if isinstance(layer, kl.OrthogonalDense):
        wide = kernel.shape[0] < kernel.shape[1]
        factor, triangle = np.linalg.qr(kernel.T if wide else kernel)
        factor = factor * np.sign(np.diag(triangle))
        return factor.T if wide else factor
    if layer.spectral_norm is not None:
        kernel = kernel * min(1.0, layer.spectral_norm / np.linalg.norm(kernel, 2))
    return kernel


def _expected(layer, x):
    if isinstance(layer, DenseLayer):
        kernel = _kernel(layer)
        y = x @ kernel + (0.0 if layer.bias is None else np.asarray(layer.bias, np.float64))
        return np.tanh(y) if layer.activation is keras.activations.tanh else y
    width = x.shape[-1]
    y = np.array([[width / (width - 1) * (row - row.mean()) for row in one] for one in x])
    if layer.gamma is not None:
        y = y * np.asarray(layer.gamma, np.float64)
    return y if layer.beta is None else y + np.asarray(layer.beta, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_values_are_those_of_the_formula(name, dtype, scale, x):
    layer = LAYERS[name](dtype=dtype)
    layer(x)
    randomize(layer, scale=scale)
    if isinstance(layer, DenseLayer):
        layer.condense()
    y = layer(x + 3.0)
    assert y.dtype == layer.compute_dtype
    expected = _expected(layer, x + 3.0)
    found = keras.ops.convert_to_numpy(keras.ops.cast(y, "float64"))
    # Caps aim a millionth below themselves, and what float16 and bfloat16 round further below.
    tolerance = (TOLERANCE[dtype] + 4e-6) * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    graph = tf.function(layer)(tf.constant(x + 3.0, layer.compute_dtype))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(keras.ops.cast(graph, "float64")), found, atol=tolerance
    )


@pytest.mark.parametrize("name", LAYERS)
def test_config_and_files_bring_layers_back(name, x, tmp_path):
    layer = LAYERS[name]()
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()
    inputs = keras.Input((None, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    randomize(layer)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(x), model(x))
    assert again.layers[-1].lipschitz() == layer.lipschitz()
    assert model.output_shape[1:] == (None, *model(x).shape[2:])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_and_pass_masks_on(name, x):
    layer = LAYERS[name]()
    model = keras.Sequential([keras.layers.Masking(0.0), layer, keras.layers.Dense(1)])
    x[:, 2:] = 0.0
    model.compile("adam", "mse")
    history = model.fit(x, np.ones((2, TOKENS, 1)), epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    masked = keras.layers.Masking(0.0)(x)
    np.testing.assert_array_equal(layer(masked)._keras_mask, masked._keras_mask)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_constants_are_never_exceeded_and_attained_by_linear_layers(name, norm, seed, x):
    layer = LAYERS[name](dtype="float64")
    layer(x)
    randomize(layer, seed=seed)
    if isinstance(layer, DenseLayer):
        layer.condense()
    bound = layer.lipschitz(norm=norm)
    assert bound.kind == "certified" and bound.norm == norm
    found = [
        jacobians.norms(jacobians.jacobian(layer, point))[norm]
        for point in (np.zeros((TOKENS, FEATURES)), x[0], 5.0 * x[1])
    ]
    assert max(found) <= bound.value * (1.0 + 1e-9)
    # At zero tanh has slope one. The memory of a cap has an allowance of 1e-6.
    assert found[0] >= bound.value * (1.0 - 1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "sigmoid", "softmax", "selu"])
@pytest.mark.parametrize("norm", NORMS)
def test_activations_count(activation, norm):
    layer = kl.SpectralDense(UNITS, activation=activation, dtype="float64")
    layer.build((None, TOKENS, FEATURES))
    randomize(layer, scale=3.0)
    bound = layer.lipschitz(norm=norm).value
    linear = kl.SpectralDense(UNITS, dtype="float64")
    linear.build((None, TOKENS, FEATURES))
    linear.set_weights(layer.get_weights())
    rng = np.random.default_rng(0)
    largest = max(
        jacobians.norms(jacobians.jacobian(layer, rng.normal(size=(TOKENS, FEATURES)) * size))[norm]
        for size in (0.3, 1.0, 3.0)
    )
    assert largest <= bound * (1.0 + 1e-9)
    assert bound <= 2.0 * linear.lipschitz(norm=norm).value


def test_unknown_activations_have_no_constant(x):
    def relu(y):
        return 9.0 * y

    for activation in ("exponential", "hard_shrink", relu, keras.layers.LeakyReLU(3.0)):
        layer = kl.SpectralDense(UNITS, activation=activation)
        layer(x)
        bound = layer.lipschitz()
        assert bound.value == math.inf and bound.reason


@pytest.mark.parametrize("width", [2, 3, 50])
@pytest.mark.parametrize("norm", NORMS)
def test_the_constant_of_center_normalization_is_exact(width, norm):
    layer = kl.CenterNormalization(dtype="float64")
    layer.build((None, width))
    # With gamma = 1 the map is width / (width - 1) times a projection.
    factor = width / (width - 1)
    exact = {"l2": factor, "token": factor, "linf": 2.0}[norm]
    assert layer.lipschitz(norm=norm).value == pytest.approx(exact, rel=1e-8)
    randomize(layer)
    matrix = np.asarray(layer(np.eye(width))) - np.asarray(layer(np.zeros((1, width))))
    attained = np.abs(matrix).sum(axis=0).max() if norm == "linf" else operator_norm(matrix)
    assert layer.lipschitz(norm=norm).value == pytest.approx(attained, rel=1e-8)


def test_center_normalization_ignores_a_shift_in_every_precision():
    x = np.array([[1.0, 2.0, 4.0, 5.0]], "float32")
    for dtype in DTYPES:
        layer = kl.CenterNormalization(dtype=dtype)
        np.testing.assert_allclose(layer(x + 64.0), layer(x), rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_condensed_dense_layers_are_certified_as_they_run(dtype, cap, x):
    layer = kl.SpectralDense(UNITS, spectral_norm=cap, use_bias=False, dtype=dtype)
    layer(x)
    randomize(layer, scale=2.0)
    with kl.condensed(layer) as (kernel,):
        bound = layer.lipschitz().value
        rows = layer(np.eye(FEATURES))
    run = keras.ops.convert_to_numpy(keras.ops.cast(kernel.value, layer.compute_dtype))
    np.testing.assert_array_equal(keras.ops.cast(rows, "float32"), run.astype("float32"))
    assert bound == pytest.approx(operator_norm(run), rel=1e-8)
    assert bound >= operator_norm(run)
    assert cap is None or bound <= cap


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kl.SpectralDense(0), r"`units` .*Received: units=0"),
        (lambda: kl.SpectralDense(2.0), r"Received: units=2.0"),
        (lambda: kl.SpectralDense(2, spectral_norm=0.0), r"Received: spectral_norm=0.0"),
        (lambda: kl.SpectralDense(2, spectral_norm=math.nan), r"Received: spectral_norm=nan"),
        (lambda: kl.SpectralDense(2)(np.zeros(3)), r"Received: input_shape=\(3,\)"),
        (
            lambda: kl.SpectralDense(2)(keras.Input((None,))),
            r"Received: input_shape=\(None, None\)",
        ),
        (lambda: kl.CenterNormalization()(np.zeros((2, 1))), r"Received: input_shape=\(2, 1\)"),
        (lambda: kl.CenterNormalization()(keras.Input((None,))), r"input_shape=\(None, None\)"),
        (lambda: kl.CenterNormalization().lipschitz(), r"Received: built=False"),
        (lambda: kl.Residual(alpha=1.5), r"Received: alpha=1.5"),
        (lambda: kl.Residual(alpha=-0.1), r"Received: alpha=-0.1"),
        (lambda: kl.Residual(alpha=math.nan), r"Received: alpha=nan"),
        (lambda: kl.Residual(trainable_alpha=True), r"Received: alpha=None"),
        (lambda: kl.Residual(alpha=1.0, trainable_alpha=True), r"Received: alpha=1.0"),
        (lambda: kl.Residual()(np.zeros((2, 3))), r"list of two.*input_shape=\(2, 3\)"),
        (lambda: kl.Residual()([np.zeros((2, 3))]), r"Received: input_shape=\[\(2, 3\)\]"),
        (lambda: kl.Residual()([np.zeros((2, 3))] * 3), r"Received: input_shape=\["),
        (lambda: kl.Residual()([np.zeros((2, 3)), np.zeros((2, 1))]), r"\(2, 3\), \(2, 1\)"),
        (lambda: kl.Residual()([np.zeros((2, 3)), np.zeros((1, 3))]), r"\(2, 3\), \(1, 3\)"),
        (lambda: kl.Residual()([np.zeros((2, 3)), np.zeros(3)]), r"\(2, 3\), \(3,\)"),
        (lambda: kl.Residual()([1.0, 2.0]), r"Received: input_shape=\[None, None\]"),
        (
            lambda: kl.Residual()(*[np.zeros((2, 3))] * 2),
            r"\[x, f\(x\)\].*: 2 positional arguments",
        ),
        (lambda: kl.Residual()(*[keras.Input((3,))] * 2), r"Received: 2 positional arguments"),
        (lambda: kl.Residual().compute_output_shape((2, 3)), r"Received: input_shape=\(2, 3\)"),
    ],
)
def test_bad_input_is_named_with_what_was_received(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["dense", "center"])
def test_built_neighbors_refuse_unknown_norms(name, x):
    layer = LAYERS[name]()
    layer(x)
    with pytest.raises(ValueError, match=r"`norm` must be one of .*Received: norm='l1'"):
        layer.lipschitz(norm="l1")
    # Accepted and without effect: tokens do not meet in these layers.
    assert layer.lipschitz(99, mask="causal") == layer.lipschitz()


def test_empty_inputs_give_empty_outputs():
    for make in LAYERS.values():
        layer = make()
        width = layer.units if isinstance(layer, DenseLayer) else FEATURES
        assert layer(np.zeros((0, TOKENS, FEATURES))).shape == (0, TOKENS, width)
    empty = np.zeros((0, 2))
    assert kl.Residual(alpha=0.5)([empty, empty]).shape == (0, 2)


# Residual --------------------------------------------------------------------


def test_a_built_residual_still_looks_at_its_inputs():
    layer = kl.Residual()
    a = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(layer(inputs=(a, a)), 2.0 * a)
    # The rows of one tensor are no list, and other shapes must not broadcast.
    for wrong in (a, [a], [a, a, a], [a, a[:, :1]], [a, a[:1]]):
        with pytest.raises(ValueError, match=r"list of two tensors .*Received: "):
            layer(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
def test_residuals_add_or_interpolate(alpha, dtype, x):
    branch = x[::-1].copy()
    layer = kl.Residual(alpha, dtype=dtype)
    found = keras.ops.convert_to_numpy(keras.ops.cast(layer([x, branch]), "float64"))
    expected = x + branch if alpha is None else (1.0 - alpha) * x + alpha * branch
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * np.abs(expected).max())
    assert layer.alpha_value() == alpha
    assert kl.Residual.from_config(layer.get_config()).alpha == alpha


@pytest.mark.parametrize("logit", [-1000.0, -20.0, 0.0, 3.0, 20.0, 1000.0])
def test_a_learned_weight_stays_between_zero_and_one(logit, x):
    layer = kl.Residual(alpha=0.25, trainable_alpha=True)
    inputs = [x, x[::-1].copy()]
    layer(inputs)
    assert layer.alpha_value() == pytest.approx(0.25)
    layer.alpha_logit.assign(logit)
    alpha = layer.alpha_value()
    assert 0.0 <= alpha <= 1.0
    expected = (1.0 - alpha) * inputs[0] + alpha * inputs[1]
    np.testing.assert_allclose(layer(inputs), expected, atol=1e-5)


def test_a_broken_weight_is_no_number():
    layer = kl.Residual(alpha=0.5, trainable_alpha=True)
    layer([np.zeros((1, 2)), np.zeros((1, 2))])
    layer.alpha_logit.assign(np.nan)
    assert math.isnan(layer.alpha_value())


def test_a_learned_weight_learns_and_is_saved(x, tmp_path):
    inputs = keras.Input((TOKENS, FEATURES))
    layer = kl.Residual(alpha=0.5, trainable_alpha=True)
    model = keras.Model(inputs, layer([inputs, keras.layers.Rescaling(3.0)(inputs)]))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(x, 3.0 * x, epochs=20, verbose=0)
    # The branch alone would be right.
    assert layer.alpha_value() > 0.6
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[-1].alpha_value() == layer.alpha_value()


@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_the_constant_of_a_residual_is_attained(alpha):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(FEATURES, FEATURES))
    symmetric = tf.constant(weights @ weights.T)
    layer = kl.Residual(alpha, dtype="float64")

    def block(x):
        return layer([x, tf.matmul(x, tf.broadcast_to(symmetric, (len(x), FEATURES, FEATURES)))])

    branch = operator_norm(symmetric)
    expected = 1.0 + branch if alpha is None else 1.0 - alpha + alpha * branch
    jac = jacobians.jacobian(block, rng.normal(size=(TOKENS, FEATURES)))
    assert jacobians.norms(jac)["l2"] == pytest.approx(expected)


def test_a_graph_with_skip_and_branch_exchanged_is_noticed():
    inputs = keras.Input((4, 6))
    branch = keras.layers.Dense(6)(keras.layers.MultiHeadAttention(2, 3)(inputs, inputs))
    with pytest.warns(
        UserWarning, match=r"computed from the second.*`Residual\(\)\(\[x, f\(x\)\]\)`"
    ):
        kl.Residual(0.25)([branch, inputs])
    # Warnings are errors here. In a sum the order does not matter, and two branches have none.
    kl.Residual(0.25)([inputs, branch])
    kl.Residual()([branch, inputs])
    # The skip is meant to get the larger weight.
    kl.Residual(0.75)([branch, inputs])
    kl.Residual(0.25)([keras.layers.Dense(6)(inputs), branch])
    kl.Residual(0.25)([inputs, inputs])
    # A skip further back than a branch is not searched for.
    deep = inputs
    for _ in range(200):
        deep = keras.ops.add(deep, 1.0)
    kl.Residual(0.25)([deep, inputs])


def test_residuals_carry_the_mask_of_the_skip(x):
    x[:, 2:] = 0.0
    masked = keras.layers.Masking(0.0)(x)
    branch = kl.SpectralDense(FEATURES)(masked)
    np.testing.assert_array_equal(kl.Residual()([masked, branch])._keras_mask, masked._keras_mask)


def test_one_side_of_a_residual_may_know_more_of_its_shape():
    inputs = keras.Input((None, FEATURES))
    known = keras.layers.Reshape((TOKENS, FEATURES))(inputs)
    assert kl.Residual()([inputs, known]).shape[-1] == FEATURES
