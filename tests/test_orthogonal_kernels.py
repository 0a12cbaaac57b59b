"""Orthonormal factors and the layers made of them: exact, robust, the same wherever they run."""

# The annotations of TensorFlow do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import randomize

import keras_lipattn as kl
from keras_lipattn.linalg import operator_norm
from keras_lipattn.linalg.cholesky import exact_orthonormal, orthonormal
from tools.benchmark.orthogonal_kernels import trained

POLICIES = ("float64", "float32", "mixed_bfloat16", "mixed_float16")
SHAPES = [(1, 1), (5, 5), (9, 4), (4, 9), (64, 64), (150, 40)]
_rng = np.random.default_rng(0)


def singular(shape):
    """Matrices without full rank, or close to one, by name."""
    rows, columns = shape
    return {
        "zeros": np.zeros(shape),
        "ones": np.ones(shape),
        "one column": _rng.random((rows, 1)) * np.ones(shape),
        "rank 1": _rng.normal(size=(rows, 1)) @ _rng.normal(size=(1, columns)),
        "rank 2": _rng.normal(size=(rows, 2)) @ _rng.normal(size=(2, columns)),
        "almost ones": 1.0 + 1e-7 * _rng.normal(size=shape),
        "Hilbert": 1.0 / (1.0 + np.arange(rows)[:, None] + np.arange(columns)),
        "graded": _rng.normal(size=shape) * np.logspace(0, -30, columns),
        "huge": 1e37 * _rng.normal(size=shape),
        "tiny": 1e-37 * _rng.normal(size=shape),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factor_is_that_of_a_decomposition(shape):
    matrix = _rng.normal(size=shape) + np.eye(*shape)
    wide = shape[0] < shape[1]
    expected, triangle = np.linalg.qr(matrix.T if wide else matrix)
    expected = expected * np.sign(np.diag(triangle))
    expected = expected.T if wide else expected
    # Roundings times the condition number, some hundreds here.
    np.testing.assert_allclose(exact_orthonormal(matrix), expected, atol=1e-11)
    found = orthonormal(tf.constant(matrix), passes=2)
    np.testing.assert_allclose(found, expected, atol=1e-11)
    np.testing.assert_allclose(orthonormal(tf.constant(expected)), expected, atol=1e-12)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_matrices_give_finite_factors_of_norm_one_at_most(shape, dtype, passes):
    for name, matrix in singular(shape).items():
        matrix = tf.constant(matrix, dtype)
        factor = np.asarray(orthonormal(matrix, passes=passes), np.float64)
        # Some roundings of float32, amplified by the inverse of the triangular factor.
        assert operator_norm(factor) <= 1.0 + 2e-5, name
        assert operator_norm(exact_orthonormal(matrix.numpy())) <= 1.0 + 1e-12, name


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_derivatives_are_those_of_the_factor(shape):
    matrix, direction, weights = (_rng.normal(size=shape) for _ in range(3))

    def derivative(matrix):
        point = tf.constant(matrix)
        with tf.GradientTape() as tape:
            tape.watch(point)
            value = tf.reduce_sum(orthonormal(point) * weights)
        return tape.gradient(value, point)

    def slope(function, h=1e-6):
        return (function(matrix + h * direction) - function(matrix - h * direction)) / (2.0 * h)

    first = slope(lambda matrix: np.sum(exact_orthonormal(matrix) * weights))
    # Central differences lose about 1e-7 of derivatives of this size.
    np.testing.assert_allclose(np.sum(derivative(matrix) * direction), first, rtol=1e-5)
    point = tf.constant(matrix)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = tf.reduce_sum(derivative(point) * direction)
    second = slope(lambda matrix: np.sum(derivative(matrix) * direction))
    np.testing.assert_allclose(np.sum(tape.gradient(value, point) * direction), second, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_leaves_singular_values_at_one(policy):
    layer = trained(policy, steps=1000)
    x = _rng.normal(size=(8, 96))
    with kl.condensed(layer) as (kernel,):
        values = np.linalg.svd(np.asarray(kernel.value, np.float64), compute_uv=False)
        condensed = np.asarray(keras.ops.cast(layer(x), "float64"))
        bound = layer.lipschitz().value
    np.testing.assert_allclose(values, 1.0, rtol=0, atol=1e-6)
    assert values.max() <= bound <= 1.0 + 1e-6
    # The inference of a model that is not condensed runs with the same kernel.
    run = np.asarray(keras.ops.cast(layer(x), "float64"))
    np.testing.assert_allclose(run, condensed, rtol=0, atol=1e-6)
    remembered = np.asarray(layer._factor._value.value, np.float64)
    np.testing.assert_allclose(np.linalg.svd(remembered, compute_uv=False), 1.0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (8, 3)])
@pytest.mark.parametrize("name", singular((2, 2)))
def test_certificates_hold_for_singular_weights(shape, name):
    layer = kl.OrthogonalDense(shape[1], use_bias=False, dtype="float32")
    inputs = keras.Input(shape[:1])
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign(singular(shape)[name])
    before = {norm: kl.certify(model, norm=norm).total for norm in ("l2", "linf")}
    run = np.asarray(layer(np.eye(shape[0])), np.float64)
    after = {norm: kl.certify(model, norm=norm).total for norm in ("l2", "linf")}
    found = {"l2": operator_norm(run), "linf": np.abs(run).sum(axis=0).max()}
    for norm in found:
        # Entries of the kernel are rounded to float32, by the graph and on the host.
        assert found[norm] <= min(before[norm], after[norm]) * (1.0 + 1e-6)
        assert layer.lipschitz(norm=norm).value >= found[norm] * (1.0 - 1e-6)


def test_broken_weights_have_no_constant_and_show():
    layer = kl.OrthogonalDense(3)
    x = np.ones((2, 4), "float32")
    layer(x)
    layer.kernel.assign(np.full((4, 3), np.nan))
    assert layer.lipschitz().value == math.inf and "NaN" in layer.lipschitz().reason
    assert np.isnan(layer(x)).all() and np.isnan(layer(x, training=True)).all()
    randomize(layer)
    assert np.isfinite(layer(x)).all() and layer.lipschitz().value <= 1.0 + 1e-6


def test_the_kernel_is_remembered_until_the_weight_changes():
    layer = kl.OrthogonalDense(3, use_bias=False)
    layer(np.zeros((1, 4)))
    for _ in range(2):
        randomize(layer)
        expected = exact_orthonormal(layer.host_kernels()[0])
        # Computed, remembered, and from the host: roundings to float32.
        np.testing.assert_allclose(layer(np.eye(4)), expected, atol=1e-6)
        np.testing.assert_allclose(layer(np.eye(4)), expected, atol=1e-6)
        layer.condense()
        np.testing.assert_allclose(layer(np.eye(4)), expected, atol=1e-6)
        np.testing.assert_allclose(layer(np.eye(4), training=True), expected, atol=1e-4)


def test_columns_of_the_last_layer_have_length_one():
    for policy in POLICIES:
        layer = kl.NormalizedDense(4, use_bias=False, dtype=policy)
        layer(np.zeros((1, 5)))
        for scale in (1e-18, 1.0, 1e30):
            randomize(layer, scale=scale)
            kernel = layer.host_weights().weights().output
            np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, rtol=1e-6)
        for vanishing in (0.0, 1e-30, 1e-42):
            layer.kernel.assign(np.full((5, 4), vanishing))
            np.testing.assert_array_equal(layer(np.ones((1, 5))), 0.0)
        assert layer.lipschitz().value == 0.0


def test_max_min_is_half_abs_between_rotations():
    x = _rng.normal(size=(3, 6))
    first, second = np.split(x, 2, axis=-1)
    rotated = np.concatenate([first + second, first - second], axis=-1) / math.sqrt(2.0)
    sums, gaps = np.split(np.asarray(kl.HalfAbs(dtype="float64")(rotated)), 2, axis=-1)
    back = np.concatenate([sums + gaps, sums - gaps], axis=-1) / math.sqrt(2.0)
    np.testing.assert_allclose(back, kl.MaxMin(dtype="float64")(x), atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 2), (4, 6, 1), (2, 4, 2, 3)])
def test_space_to_depth_moves_blocks_into_tokens(shape):
    x = np.arange(2 * math.prod(shape)).reshape(2, *shape)
    y = np.asarray(kl.SpaceToDepth(2, dtype="float64")(x))
    np.testing.assert_array_equal(np.sort(y, axis=None), np.sort(x, axis=None))
    block = x[(slice(None), *(slice(2) for _ in shape[:-1]))]
    first = y[(slice(None), *(0 for _ in shape[:-1]))]
    np.testing.assert_array_equal(first, block.reshape(2, -1))
    model = keras.Sequential([keras.Input(shape), kl.SpaceToDepth(2)])
    assert model.output_shape[1:] == y.shape[1:]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pool_size", [None, 2, (1, 3)])
def test_norm_pooling_is_the_norm_of_each_window(pool_size, policy):
    # Squares of 300 overflow in float16.
    x = 300.0 * _rng.normal(size=(2, 4, 6, 3))
    rows, columns = (4, 6) if pool_size is None else np.broadcast_to(pool_size, 2)
    windows = x.reshape(2, 4 // rows, rows, 6 // columns, columns, 3)
    expected = np.sqrt(np.square(windows).sum(axis=(2, 4)))
    expected = expected[:, 0, 0] if pool_size is None else expected
    found = kl.NormPooling(pool_size, dtype=policy)(x)
    tolerance = {"mixed_bfloat16": 2e-2, "mixed_float16": 2e-3}.get(policy, 1e-6)
    found = keras.ops.convert_to_numpy(keras.ops.cast(found, "float64"))
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_norm_pooling_has_a_derivative_everywhere():
    x = tf.zeros((1, 4, 3))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = kl.NormPooling(2)(x)
    np.testing.assert_array_equal(tape.gradient(y, x), 0.0)


MISTAKES = {
    "no static width": (lambda: kl.OrthogonalDense(2)(keras.Input((None,))), "static last axis"),
    "units": (lambda: kl.NormalizedDense(0), "Received: units=0"),
    "odd": (lambda: kl.HalfAbs()(np.zeros((1, 3))), "even"),
    "blocks": (lambda: kl.SpaceToDepth(3)(np.zeros((1, 4, 2))), "multiple of `block_size`"),
    "no tokens": (lambda: kl.SpaceToDepth(2)(np.zeros((1, 4))), "multiple of `block_size`"),
    "block size": (lambda: kl.SpaceToDepth(0), "Received: block_size=0"),
    "windows": (lambda: kl.NormPooling(3)(np.zeros((1, 4, 2))), "must divide"),
    "window size": (lambda: kl.NormPooling(0), "Received: pool_size=0"),
    "axes": (lambda: kl.NormPooling((2, 2))(np.zeros((1, 4, 2))), "must divide"),
    "no positions": (lambda: kl.NormPooling()(np.zeros((1, 4))), "axis of tokens"),
    "filters": (lambda: kl.SpectralConv2D(0, 3), "Received: units=0"),
    "kernel size": (lambda: kl.SpectralConv2D(2, 0), "Received: kernel_size=0"),
    "padding": (lambda: kl.SpectralConv2D(2, 3, padding="causal"), "Received: padding='causal'"),
    "cap": (lambda: kl.SpectralConv2D(2, 3, spectral_norm=0.0), "Received: spectral_norm=0.0"),
    "conv filters": (lambda: kl.OrthogonalConv2D(0), "Received: filters=0"),
    "even kernel": (lambda: kl.OrthogonalConv2D(2, 4), "Received: kernel_size=4"),
    "conv image": (lambda: kl.OrthogonalConv2D(2)(np.zeros((1, 4, 2))), "shape (batch, height"),
    "image": (lambda: kl.SpectralConv2D(2, 3)(np.zeros((1, 4, 2))), "shape (batch, height"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    make, message = MISTAKES[name]
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "Received: " in str(error.value)


# Convolutions -----------------------------------------------------------------------------------


def _matrix(kernel, strides, padding, shape):
    """A convolution as a matrix, from its images of unit vectors."""
    units = np.eye(math.prod(shape)).reshape(-1, *shape)
    images = keras.ops.conv(units, kernel, strides, padding, data_format="channels_last")
    return np.asarray(images).reshape(len(units), -1)


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    ("kernel_size", "strides"), [(3, 1), (3, 2), (4, 2), ((3, 2), (1, 2)), (2, 2), (1, 2), (5, 3)]
)
def test_a_convolution_stays_under_its_cap_and_is_close_to_it(
    kernel_size, strides, padding, policy
):
    layer = kl.SpectralConv2D(4, kernel_size, strides, padding, spectral_norm=0.5, dtype=policy)
    shape = (14, 13, 2)
    layer.build((None, *shape))
    for seed in range(3):
        randomize(layer, scale=2.0, seed=seed)
        with kl.condensed(layer):
            bound = layer.lipschitz().value
        kernel = layer.host_weights().weights().output.astype(np.float64)
        kernel = kernel.reshape(layer.kernel.shape)
        exact = operator_norm(_matrix(kernel, layer.strides, padding, shape))
        assert exact <= bound <= 0.5
        # 4 % between frequencies, the border of a small image, and what bfloat16 rounds below.
        assert exact >= 0.85 * 0.5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3, 9, 20])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_an_orthogonal_convolution_shifts_channels_and_mixes_them(kernel_size, channels, policy):
    filters, shape = 2 * channels, (7, 6, channels)
    layer = kl.OrthogonalConv2D(filters, kernel_size, use_bias=False, dtype=policy)
    x = _rng.normal(size=(2, *shape)).round(1)
    found = keras.ops.convert_to_numpy(keras.ops.cast(layer(x), "float64"))
    mixing = exact_orthonormal(np.asarray(layer.weights[0], np.float64))
    reach, expected = kernel_size // 2, 0.0
    padded = np.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)])
    # The groups in the order of the distance from the middle, each of nearly the same size.
    offsets = sorted(
        np.ndindex(kernel_size, kernel_size), key=lambda at: (sum((np.array(at) - reach) ** 2), at)
    )
    for channel in range(channels):
        row, column = offsets[channel * kernel_size**2 // channels]
        moved = padded[:, row : row + shape[0], column : column + shape[1], channel]
        expected = expected + moved[..., None] * mixing[channel]
    tolerance = {"mixed_bfloat16": 2e-2, "mixed_float16": 2e-3, "float32": 1e-5}.get(policy, 1e-11)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    model = keras.Sequential([keras.Input(shape), layer])
    assert abs(kl.certify(model).total - 1.0) < 1e-6


def test_what_an_orthogonal_convolution_loses_leaves_at_the_border():
    layer = kl.OrthogonalConv2D(24, use_bias=False, dtype="float64")
    x = np.pad(_rng.normal(size=(3, 5, 5, 12)), [(0, 0), (1, 1), (1, 1), (0, 0)])
    sizes = np.linalg.norm(np.asarray(layer(x)).reshape(3, -1), axis=1)
    np.testing.assert_allclose(sizes, np.linalg.norm(x.reshape(3, -1), axis=1), rtol=1e-12)


def test_local_radii_pass_through_an_orthogonal_convolution():
    inputs = keras.Input((5, 5, 12))
    x = keras.layers.Flatten()(kl.OrthogonalConv2D(12)(inputs))
    model = keras.Model(inputs, kl.OrthogonalDense(3)(x))
    x = _rng.normal(size=(2, 5, 5, 12))
    globally = kl.certify(model).certified_radius(model.predict(x, verbose=0))
    # The map is affine, so only the bound of the roundings makes a difference.
    np.testing.assert_allclose(kl.certified_radius(model, x), globally, atol=5e-3)


def test_convolutions_come_back_from_files(tmp_path):
    inputs = keras.Input((9, 8, 2))
    x = kl.SpectralConv2D(4, 3, (2, 1), "same", activation="relu")(inputs)
    x = kl.OrthogonalConv2D(10, activation="tanh")(x)
    x = kl.NormPooling()(kl.SpaceToDepth(1)(kl.HalfAbs()(x)))
    model = keras.Model(inputs, kl.NormalizedDense(3)(kl.OrthogonalDense(5)(x)))
    randomize(model)
    x = _rng.normal(size=(2, 9, 8, 2)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, np.zeros((2, 3)), verbose=0, callbacks=[kl.LipschitzMonitor()])
    outputs = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), outputs, rtol=1e-6, atol=1e-6)
    assert kl.certify(again).total == kl.certify(model).total
    with kl.condensed(model):
        np.testing.assert_allclose(model(x), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_blocks_of_one_token_have_the_constant_one_exactly(norm):
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, kl.SpaceToDepth(1, name="space_to_depth")(inputs))
    assert kl.certify(model, norm).row("space_to_depth").constant == 1.0
