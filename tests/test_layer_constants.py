"""Constants of ordinary layers: never below the Jacobian of the Keras layer, often equal."""

import functools
import math

import keras
import numpy as np
import pytest
from helpers import bounds_cases as cases

import keras_lipattn as kl
from keras_lipattn.bounds import layer_constants as constants
from keras_lipattn.linalg import operator_norm

NORMS = ("l2", "token", "linf")
# Central differences with step 1e-6 in float64.
ROUNDING = 1e-8


def jacobian(function, x):
    """Jacobian of a function of a batch of float64 arrays at one, `[tokens, width, ...]`."""
    steps = 1e-6 * np.eye(x.size).reshape(-1, *x.shape)
    ahead, behind = (np.asarray(function(x + sign * steps)) for sign in (1, -1))
    columns = (ahead - behind) / 2e-6
    jac = np.moveaxis(columns.reshape(x.size, -1), 0, 1)
    return jac.reshape(-1, columns.shape[-1], x.size // x.shape[-1], x.shape[-1])


def certified(layer, shape, norm):
    """The certificate of a model of one layer."""
    return kl.certify(
        keras.Sequential([keras.Input(shape, dtype="float64"), layer]), norm=norm
    ).total


@pytest.mark.parametrize("name", sorted(set(constants.ACTIVATIONS) - {"softmax"}))
def test_activations_have_the_stated_largest_slope(name):
    function = getattr(keras.activations, name.removesuffix("_tanh") if "gelu" in name else name)
    options = {"approximate": name == "gelu_tanh"} if "gelu" in name else {}
    x = np.arange(-300_000, 300_001) * 1e-4
    y = np.asarray(function(keras.ops.convert_to_tensor(x), **options))
    largest = np.abs(np.diff(y)).max() / 1e-4
    stated = constants.activation_constant(name)
    # Rounded up in the sixth decimal; squareplus and its kin approach 1 at infinity only.
    assert (1 - 2e-3) * stated <= largest <= (1 + ROUNDING) * stated


def test_the_sparsemax_of_keras_jumps_and_is_refused():
    def first(step):
        x = keras.ops.convert_to_tensor(np.array([[2.0, 1.0 + step]]))
        return float(np.asarray(keras.activations.sparsemax(x))[0, 0])

    assert abs(first(1e-6) - first(-1e-6)) > 0.9
    assert "sparsemax" in constants.UNBOUNDED_ACTIVATIONS


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("norm", NORMS)
def test_activations_of_whole_rows_stay_below_their_constants(name, norm):
    rng = np.random.default_rng(0)
    stated = constants.activation_constant(name, norm, width=5)
    largest = 0.0
    for size in (0.1, 1.0, 5.0, 50.0):
        jac = jacobian(getattr(keras.activations, name), size * rng.normal(size=(2, 5)))
        largest = max(largest, cases.attained(jac, norm)[0])
    # Two equal largest entries: the worst point of softmax.
    x = np.array([[9.0, 9.0, -9.0, -9.0, -9.0]])
    jac = jacobian(getattr(keras.activations, name), x)
    largest = max(largest, cases.attained(jac, norm)[0])
    assert 0.6 * stated <= largest <= (1 + ROUNDING) * stated


def test_activations_without_a_constant_are_named():
    for name in constants.UNBOUNDED_ACTIVATIONS:
        assert name not in constants.ACTIVATIONS
        with pytest.raises(KeyError):
            constants.activation_constant(name)
    with pytest.raises(KeyError):
        constants.activation_constant("log_softmax")
    assert constants.slope_constant(0.3) == 1.0
    assert constants.slope_constant([-2.0, 0.1]) == 2.0
    assert constants.slope_constant(math.nan) == math.inf


@pytest.mark.parametrize("norm", NORMS)
def test_dense_is_exact(norm):
    rng = np.random.default_rng(1)
    for _ in range(10):
        kernel = rng.normal(size=rng.integers(1, 6, size=2))
        jac = jacobian(lambda x, kernel=kernel: x @ kernel, rng.normal(size=(2, len(kernel))))
        layer = keras.layers.Dense(kernel.shape[1], use_bias=False, dtype="float64")
        layer.build((None, len(kernel)))
        layer.kernel.assign(kernel)
        # The token norm of the adversary is found by alternating maximization.
        assert certified(layer, (2, len(kernel)), norm) == pytest.approx(
            cases.attained(jac, norm)[0], rel=1e-3
        )


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions_stay_below_their_constants(padding, strides, dilation, rank):
    rng = np.random.default_rng(2)
    make = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D}[rank]
    for size in (1, 2, 3):
        for groups in (1, 2):
            shape = (6,) if rank == 1 else (5, 3)
            if padding == "valid" and (size - 1) * dilation + 1 > min(shape):
                continue
            layer = make(
                4,
                size,
                strides,
                padding,
                dilation_rate=dilation,
                groups=groups,
                dtype="float64",
            )
            layer.build((None, *shape, 2))
            layer.kernel.assign(rng.normal(size=layer.kernel.shape))
            jac = jacobian(layer, np.zeros((*shape, 2)))
            for norm in NORMS:
                for input_shape in (None, shape):
                    bound = constants.convolution_constant(
                        np.asarray(layer.kernel),
                        norm,
                        strides=strides,
                        dilation=dilation,
                        groups=groups,
                        input_shape=input_shape,
                    )
                    measured = cases.attained(jac, norm)[0]
                    assert measured <= (1 + ROUNDING) * bound, (size, groups, norm)
                    if norm == "l2" and size == strides and dilation == 1 and padding == "valid":
                        assert measured == pytest.approx(bound)


@pytest.mark.parametrize(
    ("size", "strides", "dilation"), [(3, 2, 2), (4, 2, 2), (5, 2, 3), (5, 6, 4)]
)
def test_strided_and_dilated_convolutions_stay_below_their_constant(size, strides, dilation):
    rng = np.random.default_rng(11)
    kernel = rng.normal(size=(size, 2, 3))
    length, span = 30, (size - 1) * dilation + 1
    padded = length + 2 * (span - 1)
    rows = []
    for start in range(0, padded - span + 1, strides):
        row = np.zeros((padded, 2, 3))
        row[start : start + span : dilation] = kernel
        rows.append(row[span - 1 : span - 1 + length])
    matrix = np.transpose(rows, (0, 3, 1, 2)).reshape(3 * len(rows), -1)
    for input_shape in (None, (length,)):
        bound = constants.convolution_constant(
            kernel, strides=strides, dilation=dilation, input_shape=input_shape
        )
        assert operator_norm(matrix) <= bound <= 3.0 * operator_norm(matrix)


def test_frequencies_are_sharper_than_overlaps_and_can_be_too_much_work():
    kernel = np.random.default_rng(3).normal(size=(5, 5, 2, 3))
    overlap = constants.convolution_constant(kernel, max_work=10)
    sharper = constants.convolution_constant(kernel, input_shape=(12, 12))
    # Over all sizes, with an allowance for what lies between the frequencies.
    assert sharper <= constants.convolution_constant(kernel) < 0.8 * overlap
    strided = constants.convolution_constant(kernel, strides=2, input_shape=(12, 12))
    assert strided < constants.convolution_constant(kernel, strides=2, max_work=10)
    assert strided < sharper
    assert constants.convolution_constant(kernel, input_shape=(12, 12), max_work=10) == overlap
    kernel[0, 0, 0, 0] = np.nan
    assert constants.convolution_constant(kernel) == math.inf
    with pytest.raises(ValueError, match="groups=2"):
        constants.convolution_constant(np.ones((3, 1, 3)), groups=2)
    with pytest.raises(ValueError, match=r"Received: \(1, 2\)"):
        constants.convolution_constant(np.ones((3, 1, 3)), strides=(1, 2))


def test_depthwise_convolutions_are_groups_of_one_channel():
    rng = np.random.default_rng(4)
    layer = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", dtype="float64")
    layer.build((None, 4, 5, 3))
    kernel = rng.normal(size=layer.kernel.shape)
    layer.kernel.assign(kernel)
    jac = jacobian(layer, rng.normal(size=(4, 5, 3)))
    for norm in NORMS:
        bound = constants.convolution_constant(
            kernel.reshape(3, 3, 1, 6), norm, groups=3, input_shape=(4, 5)
        )
        assert cases.attained(jac, norm)[0] <= (1 + ROUNDING) * bound
        assert bound <= 3 * cases.attained(jac, norm)[0]


def normalizations(rng, width):
    """Layers with random scales, and their constant in a norm."""
    gamma, epsilon = rng.normal(size=width), 0.1
    layer = keras.layers.LayerNormalization(epsilon=epsilon, dtype="float64")
    layer.build((None, 2, width))
    layer.set_weights([gamma, np.zeros(width)])
    yield layer, functools.partial(certified, layer, (2, width))
    layer = keras.layers.RMSNormalization(epsilon=epsilon, dtype="float64")
    layer.build((None, 2, width))
    layer.set_weights([gamma])
    yield layer, functools.partial(certified, layer, (2, width))
    layer = keras.layers.BatchNormalization(epsilon=epsilon, dtype="float64")
    layer.build((None, 2, width))
    variance = rng.random(width)
    layer.set_weights([gamma, np.zeros(width), np.zeros(width), variance])
    yield layer, lambda n: constants.batch_normalization_constant(gamma, variance, epsilon)
    layer = kl.CenterNormalization(dtype="float64")
    layer.build((None, 2, width))
    layer.set_weights([gamma, np.zeros(width)])
    yield layer, functools.partial(constants.center_normalization_constant, gamma)


@pytest.mark.parametrize("width", [2, 3, 6])
def test_normalizations_stay_below_their_constants_and_attain_them(width):
    rng = np.random.default_rng(width)
    for function, constant in normalizations(rng, width):
        for size in (0.0, 0.01, 0.3, 3.0):
            x = rng.normal() + size * rng.normal(size=(2, width))
            if size == 0.0:
                x *= 0.0
            jac = jacobian(function, x)
            for norm in NORMS:
                measured = cases.attained(jac, norm)[0]
                assert measured <= (1 + ROUNDING) * constant(norm)
                if size == 0.0 and norm == "l2":
                    assert measured == pytest.approx(constant(norm))


def test_unit_normalization_stays_below_its_constant():
    rng = np.random.default_rng(5)
    layer = keras.layers.UnitNormalization(dtype="float64")
    # Keras divides by at least 1e-12.
    for size in (1e-13, 1e-12, 1e-11):
        jac = jacobian(lambda x, size=size: layer(size * x) / size, rng.normal(size=(2, 3)))
        for norm in NORMS:
            bound = certified(layer, (2, 3), norm)
            assert cases.attained(jac, norm)[0] <= (1 + ROUNDING) * bound
    assert certified(layer, (2, 3), "l2") == pytest.approx(1e12)


def test_normalizations_that_can_divide_by_zero_are_infinite():
    for make in (keras.layers.LayerNormalization, keras.layers.RMSNormalization):
        assert certified(make(epsilon=0.0), (2, 3), "l2") == math.inf
    assert constants.batch_normalization_constant(np.ones(2), [0.0, 1.0], 0.0) == math.inf
    assert constants.batch_normalization_constant([np.nan, 1.0], [1.0, 1.0], 0.1) == math.inf
    broken = keras.layers.LayerNormalization(
        gamma_initializer=keras.initializers.Constant(math.nan)
    )
    assert certified(broken, (2, 3), "l2") == math.inf
    for norm in NORMS:
        assert constants.center_normalization_constant([np.nan, 1.0], norm) == math.inf
    with pytest.raises(ValueError, match=r"Received: gamma\.shape=\(1,\)"):
        constants.center_normalization_constant(np.ones(1))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("pool", "strides"), [(2, 2), (3, 1), (3, 2), (2, 3)])
def test_pooling_stays_below_its_constants(padding, pool, strides):
    rng = np.random.default_rng(6)
    shape, channels = (5, 4), 3
    arguments = {
        "pool_size": (pool, pool),
        "strides": (strides, strides),
        "input_shape": shape,
        "padding": padding,
    }
    average = keras.layers.AveragePooling2D(pool, strides, padding, dtype="float64")
    maximum = keras.layers.MaxPooling2D(pool, strides, padding, dtype="float64")
    # One large entry that many windows pick, and different channels that pick different tokens.
    # No ties: a maximum has no derivative there.
    peak = 0.01 * rng.normal(size=(*shape, channels))
    peak[2, 2] = 1.0
    for x in (peak, rng.normal(size=(*shape, channels)), rng.normal(size=(*shape, channels))):
        for norm in NORMS:
            jac = jacobian(average, x)
            bound = constants.average_pooling_constant(norm, **arguments)
            assert cases.attained(jac, norm)[0] <= (1 + ROUNDING) * bound
            jac = jacobian(maximum, x)
            bound = constants.max_pooling_constant(norm, channels=channels, **arguments)
            assert cases.attained(jac, norm)[0] <= (1 + ROUNDING) * bound
    if padding == "valid":
        jac = jacobian(maximum, peak)
        bound = constants.max_pooling_constant("l2", channels=channels, **arguments)
        assert cases.attained(jac, "l2")[0] == pytest.approx(bound)


def test_pooling_needs_a_known_padding():
    with pytest.raises(ValueError, match="Received: padding='causal'"):
        constants.average_pooling_constant(
            "l2", pool_size=(2,), strides=(2,), input_shape=(4,), padding="causal"
        )


@pytest.mark.parametrize("norm", NORMS)
def test_reductions_and_permutations_stay_below_their_constants(norm):
    rng = np.random.default_rng(7)
    tokens, width = 5, 3
    x = rng.normal(size=(tokens, width))
    x[[0, 1, 2], [0, 1, 2]] = 9.0
    largest = keras.layers.GlobalMaxPooling1D(dtype="float64")
    cases_ = [
        (lambda x: x.mean(axis=1), constants.global_average_constant(norm, tokens)),
        (largest, certified(largest, (tokens, width), norm)),
        (lambda x: x.reshape(len(x), 1, -1), constants.regroup_constant(norm, tokens)),
        (lambda x: x.transpose(0, 2, 1), constants.regroup_constant(norm, tokens)),
    ]
    for function, bound in cases_:
        measured = cases.attained(jacobian(function, x), norm)[0]
        # Exact, each of them; the adversary comes within a per mille.
        assert 0.999 * bound <= measured <= (1 + ROUNDING) * bound


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("last_axis", [True, False])
def test_concatenations_stay_below_their_constants(norm, last_axis):
    rng = np.random.default_rng(8)
    inputs = keras.Input((2, 4), dtype="float64")
    branches = [keras.layers.Dense(2, "tanh", use_bias=False, dtype="float64") for _ in range(3)]
    axis = -1 if last_axis else 1
    join = keras.layers.Concatenate(axis, dtype="float64")
    outputs = join([branch(inputs) for branch in branches])
    model = keras.Model(inputs, outputs)
    for _ in range(5):
        for branch in branches:
            branch.kernel.assign(rng.normal(size=(4, 2)))
        bound = kl.certify(model, norm=norm).total
        # At the origin the derivative of tanh is 1.
        jac = jacobian(model, np.zeros((2, 4)))
        assert cases.attained(jac, norm)[0] <= (1 + ROUNDING) * bound
    branches[1].kernel.assign(np.full((4, 2), np.nan))
    assert kl.certify(model, norm=norm).total == math.inf


def test_norms_convert_by_their_largest_ratio():
    rng = np.random.default_rng(9)
    tokens, width = 4, 3

    def norms(x):
        rows = np.linalg.norm(x, axis=1)
        return {"l2": np.linalg.norm(rows), "token": rows.max(), "linf": np.abs(x).max()}

    flat = norms(np.ones((tokens, width)))
    for source in NORMS:
        for target in NORMS:
            ratio = constants.conversion_constant(source, target, tokens=tokens, width=width)
            for _ in range(20):
                measured = norms(rng.normal(size=(tokens, width)) ** 3)
                assert measured[target] <= ratio * measured[source]
            # Flat arrays attain growing conversions, single entries the others.
            assert ratio == pytest.approx(max(flat[target] / flat[source], 1.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: constants.activation_constant("relu", "l1"),
        lambda: constants.center_normalization_constant(np.ones(2), "l1"),
        lambda: constants.regroup_constant("l1", 3),
        lambda: constants.conversion_constant("l1", "l2", tokens=1, width=1),
    ],
)
def test_unknown_norms_are_refused(call):
    with pytest.raises(ValueError, match="Received: norm='l1'"):
        call()
