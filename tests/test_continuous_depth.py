"""Continuous depth approximates the flow of an equation, and its constants are certified."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportOptionalSubscript=false, reportOptionalOperand=false

import dataclasses
import itertools
import math
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import jacobians
from keras import ops
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import keras_lipattn as kl
from keras_lipattn.layers._runge_kutta import make_step

ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4}
NORMS = ("l2", "token", "linf")


def attention(dtype="float64", **options):
    return kl.L2MultiHeadAttention(2, 3, bias_initializer="normal", dtype=dtype, **options)


def perceptron(dtype="float64"):
    return keras.Sequential(
        [
            attention(dtype),
            kl.SpectralDense(8, activation="tanh", spectral_norm=None, dtype=dtype),
            kl.SpectralDense(4, spectral_norm=None, dtype=dtype),
        ]
    )


def linear():
    return kl.SpectralDense(4, use_bias=False, spectral_norm=None, dtype="float64")


@dataclasses.dataclass(frozen=True)
class Case:
    """A smooth branch and the options of the layer."""

    name: str
    branch: typing.Callable[..., typing.Any]
    options: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    padded: bool = False

    def build(self, dtype="float64", **changes):
        """The layer, a mask or `None`, and inputs."""
        keras.utils.set_random_seed(5)
        layer = kl.ContinuousDepth(self.branch(dtype), **{**self.options, **changes}, dtype=dtype)
        x = np.random.default_rng(6).normal(size=(2, 4, 4)).astype(keras.backend.floatx())
        x = x.astype("float64") if dtype == "float64" else x
        layer.build(x.shape)
        mask = np.array([[True] * 4, [True] * 3 + [False]]) if self.padded else None
        return layer, x, mask


CASES = [
    Case("attention", attention),
    Case("causal", attention, {"use_causal_mask": True, "time": 0.5}),
    Case("decay and padding", attention, {"decay": 1.5, "time": 0.7}, padded=True),
    Case("backwards", attention, {"time": -0.5, "decay": 0.5}),
    Case("perceptron", perceptron, {"time": 0.5}, padded=True),
    Case("three depths", lambda dtype: [attention(dtype) for _ in range(3)], {"decay": 0.3}),
]
BY_NAME = {case.name: case for case in CASES}


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def solution(layer, x, mask):
    """The exact flow, by an adaptive solver with the branch as a black box."""
    branches = layer.branch if isinstance(layer.branch, list) else [layer.branch]

    def run(branch, state):
        for part in getattr(branch, "layers", [branch]):
            if isinstance(part, kl.L2MultiHeadAttention):
                state = part(state, query_mask=mask, use_causal_mask=layer.use_causal_mask)
            else:
                state = part(state)
        return state

    @tf.function(autograph=False)
    def images(state):
        return tf.stack([run(branch, state) for branch in branches])

    def field(t, flat):
        state = flat.reshape(x.shape)
        place = np.clip(t / layer.time, 0.0, 1.0) * (len(branches) - 1)
        weights = np.maximum(0.0, 1.0 - np.abs(place - np.arange(len(branches))))
        slope = np.tensordot(weights, images(tf.constant(state)).numpy(), 1)
        if mask is not None:
            slope *= mask[..., None]
        return (slope - layer.decay * state).ravel()

    # The slope has kinks at the depths of the branches: solve each part separately.
    ends = np.linspace(0.0, layer.time, max(len(branches), 2))
    flat = x.ravel()
    for start, end in itertools.pairwise(ends):
        flat = solve_ivp(field, (start, end), flat, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return flat.reshape(x.shape)


def test_error_falls_with_the_order_of_the_method(case):
    layer, x, mask = case.build()
    exact = solution(layer, x, mask)
    for method, order in ORDERS.items():
        errors = []
        for count in (8, 16):
            options = {**case.options, "steps": count, "method": method}
            other = kl.ContinuousDepth(layer.branch, **options, dtype="float64")
            errors.append(np.abs(numpy(other(x, mask=mask)) - exact).max())
        # The next power of the step size still contributes.
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4), method
        assert errors[-1] < 0.2 * np.abs(exact).max() * 4.0 ** (1 - order)


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_flow_of_a_linear_branch_is_the_exponential_of_its_matrix(decay):
    dense = linear()
    layer = kl.ContinuousDepth(dense, time=1.2, steps=200, decay=decay, dtype="float64")
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    y = numpy(layer(x))
    matrix = numpy(dense.kernel) - decay * np.eye(4)
    # 200 steps of order 4: about (1.2 / 200)**4 = 1e-9.
    np.testing.assert_allclose(y, x @ expm(1.2 * matrix), rtol=0, atol=1e-8)


def test_one_step_is_the_formula_of_its_method():
    dense = linear()
    dense.build((None, 4))
    z = 0.6 * numpy(dense.kernel)
    x = np.random.default_rng(0).normal(size=(2, 4))
    for method, order in ORDERS.items():
        layer = kl.ContinuousDepth(dense, time=0.6, steps=1, method=method, dtype="float64")
        terms = [np.linalg.matrix_power(z, k) / math.factorial(k) for k in range(order + 1)]
        np.testing.assert_allclose(numpy(layer(x)), x @ sum(terms), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ORDERS)
def test_constant_of_a_step_is_the_truncated_exponential_series(method):
    for bound in (0.0, 0.3, 7.0):
        for size in (0.1, -0.5):
            for decay in (0.0, 2.0):
                step = make_step(method, size, decay, "float64")
                z = abs(size) * bound
                series = sum(z**k / math.factorial(k) for k in range(ORDERS[method] + 1))
                expected = math.exp(-decay * size) * series
                constant = step.constant([bound] * len(step.nodes))
                assert constant == pytest.approx(expected, rel=1e-12)
                assert constant <= math.exp(z - decay * size) * (1.0 + 1e-12)


@pytest.mark.parametrize("method", ORDERS)
def test_constant_is_attained_by_a_field_that_stretches_evenly(method):
    dense = linear()
    layer = kl.ContinuousDepth(dense, time=2.0, steps=3, method=method, decay=0.5, dtype="float64")
    layer.build((None, 3, 4))
    dense.kernel.assign(1.3 * np.eye(4))
    x = np.ones((1, 3, 4))
    for norm in NORMS:
        assert layer.lipschitz(norm=norm).value == pytest.approx(numpy(layer(x)).max(), rel=1e-8)


def test_constants_of_the_steps_are_below_those_of_the_flow(case):
    layer, _, _ = case.build()
    if isinstance(layer.branch, list):
        pytest.skip("steps read other depths than the integral")
    for norm in NORMS:
        for own, reverse in ((layer.lipschitz, False), (layer.reverse_lipschitz, True)):
            steps = own(norm=norm).value
            flow = layer.flow_lipschitz(norm=norm, reverse=reverse).value
            assert 0.0 < steps <= flow
            bound = layer.branch.lipschitz if hasattr(layer.branch, "lipschitz") else None
            if bound is not None:
                mask = "causal" if layer.use_causal_mask else "full"
                rate = layer.decay * layer.time * (-1.0 if reverse else 1.0)
                constant = bound(norm=norm, mask=mask).value
                expected = math.exp(constant * abs(layer.time) - rate)
                assert flow == pytest.approx(expected, rel=1e-8)


def test_flow_of_several_depths_integrates_their_constants():
    layer, _, _ = BY_NAME["three depths"].build(time=2.0)
    first, second, third = (branch.lipschitz().value for branch in layer.branch)
    exponent = 2.0 * (first / 4 + second / 2 + third / 4) - 2.0 * layer.decay
    assert layer.flow_lipschitz().value == pytest.approx(math.exp(exponent), rel=1e-8)


def test_attacks_stay_below_the_constants(case):
    layer, x, mask = case.build(steps=1)
    functions = {layer: layer.lipschitz, layer.reverse: layer.reverse_lipschitz}
    bounds = {
        function: {norm: own(norm=norm).value for norm in NORMS}
        for function, own in functions.items()
    }
    # The second example is the padded one, where there is padding.
    example, valid = x[1], None if mask is None else mask[1:]

    def at(function):
        if valid is None:
            return function
        return lambda copies: function(copies, mask=np.repeat(valid, len(copies), 0))

    for function, bound in bounds.items():
        found = jacobians.norms(jacobians.jacobian(at(function), example))
        for norm in NORMS:
            assert 0.0 < found[norm] <= bound[norm] * (1.0 + 1e-6)
    found = jacobians.ascend(at(layer), example, "l2", steps=3)
    assert found <= bounds[layer]["l2"] * (1.0 + 1e-6)


def test_decay_above_the_constant_of_the_branch_brings_all_inputs_together():
    keras.utils.set_random_seed(0)
    branch = attention(lipschitz_bound=1.0)
    x = np.random.default_rng(0).normal(size=(2, 4, 4))
    for steps in (3, 30):
        layer = kl.ContinuousDepth(branch, time=15.0, steps=steps, decay=1.5, dtype="float64")
        y = numpy(layer(x))
        # An explicit step of this size for the decay would be unstable.
        bound = layer.lipschitz().value
        assert bound <= math.exp(-0.5 * 15.0) * (1 + 1e-6)
        assert np.linalg.norm(y[0] - y[1]) <= bound * np.linalg.norm(x[0] - x[1])


def test_reverse_undoes_the_flow_up_to_the_order(case):
    errors = []
    for steps in (4, 8):
        layer, x, mask = case.build(steps=steps)
        y = layer(x, mask=mask)
        errors.append(np.abs(numpy(layer.reverse(y, mask=mask)) - x).max())
    assert errors[1] < 1e-3
    # The order is higher if the errors of `call` and `reverse` cancel.
    assert math.log2(errors[0] / errors[1]) > 3.5


def test_flow_for_a_negative_time_is_the_reverse():
    layer, x, mask = BY_NAME["decay and padding"].build()
    other = kl.ContinuousDepth(layer.branch, time=-layer.time, decay=layer.decay, dtype="float64")
    np.testing.assert_array_equal(numpy(other(x, mask=mask)), numpy(layer.reverse(x, mask=mask)))
    assert other.lipschitz().value == layer.reverse_lipschitz().value


@pytest.mark.parametrize("name", ["attention", "causal", "decay and padding", "perceptron"])
def test_half_the_time_twice_is_the_whole(name):
    layer, x, mask = BY_NAME[name].build(steps=4)
    half = kl.ContinuousDepth(
        layer.branch,
        time=layer.time / 2,
        steps=2,
        decay=layer.decay,
        use_causal_mask=layer.use_causal_mask,
        dtype="float64",
    )
    twice = half(half(x, mask=mask), mask=mask)
    np.testing.assert_allclose(numpy(twice), numpy(layer(x, mask=mask)), rtol=1e-12, atol=1e-12)
    assert half.lipschitz().value ** 2 == pytest.approx(layer.lipschitz().value, rel=1e-8)


def test_equal_depths_are_one():
    layer, x, _ = BY_NAME["attention"].build()
    several = kl.ContinuousDepth([layer.branch] * 3, dtype="float64")
    np.testing.assert_allclose(numpy(several(x)), numpy(layer(x)), rtol=1e-12, atol=1e-12)
    assert several.lipschitz().value == pytest.approx(layer.lipschitz().value, rel=1e-12)


def test_padded_tokens_only_decay_and_do_not_affect_others():
    for name in ("decay and padding", "perceptron"):
        layer, x, mask = BY_NAME[name].build()
        noisy = np.where(mask[..., None], x, np.nan)
        y = numpy(layer(noisy, mask=mask))
        np.testing.assert_array_equal(y[mask], numpy(layer(x, mask=mask))[mask])
        assert np.isnan(y[~mask]).all()
        kept = math.exp(-layer.decay * layer.time) * x[~mask]
        np.testing.assert_allclose(numpy(layer(x, mask=mask))[~mask], kept, rtol=1e-12)
        np.testing.assert_allclose(y[1:, :3], numpy(layer(x[1:, :3])), rtol=1e-12, atol=1e-12)


def test_later_tokens_do_not_reach_earlier_ones_of_a_causal_flow():
    layer, x, _ = BY_NAME["causal"].build()
    changed = x.copy()
    changed[:, -1] += 1.0
    for function in (layer, layer.reverse):
        before, after = (numpy(function(t)) for t in (x, changed))
        np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
        assert np.abs(before[:, -1] - after[:, -1]).max() > 0.1


def test_gradients_are_those_of_the_steps():
    layer, x, _ = BY_NAME["three depths"].build(steps=2)
    weights = layer.trainable_variables
    assert len(weights) == 12
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x) ** 2)
    gradients = tape.gradient(loss, [weight.value for weight in weights])
    rng = np.random.default_rng(1)
    starts = [weight.numpy() for weight in weights]
    moves = [rng.normal(size=weight.shape) for weight in weights]
    values = []
    for shift in (1e-5, -1e-5):
        for weight, start, move in zip(weights, starts, moves, strict=True):
            weight.assign(start + shift * move)
        values.append(float(tf.reduce_sum(layer(x) ** 2)))
    slope = (values[0] - values[1]) / 2e-5
    found = sum(float(tf.reduce_sum(g * m)) for g, m in zip(gradients, moves, strict=True))
    # The central difference has an error of 1e-10 relative to the third derivative.
    assert found == pytest.approx(slope, rel=1e-5)
    assert all(float(tf.reduce_max(tf.abs(gradient))) > 0.0 for gradient in gradients)


@pytest.mark.parametrize("name", ["decay and padding", "three depths"])
def test_same_function_in_training_in_a_graph_and_compiled(name):
    layer, x, mask = BY_NAME[name].build("float32", steps=1)
    y = numpy(layer(x, mask=mask))
    np.testing.assert_array_equal(numpy(layer(x, mask=mask, training=True)), y)
    compiled = tf.function(layer, autograph=False, jit_compile=True)
    np.testing.assert_allclose(numpy(compiled(x, mask=mask)), y, rtol=0, atol=1e-5)


def test_layer_trains_and_its_certificate_follows():
    layer, x, _ = BY_NAME["attention"].build("float32", steps=2, method="euler")
    model = keras.Sequential([keras.Input((4, 4)), layer])
    before = kl.certify(model).total
    model.compile(keras.optimizers.Adam(0.1), "mse")
    history = model.fit(np.repeat(x, 8, 0), 0.5 * np.repeat(x, 8, 0), epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    after = kl.certify(model).total
    assert after != before
    # Each level of a certificate adds an allowance of 1e-9 for rounding.
    assert after == pytest.approx(layer.lipschitz().value, rel=1e-8)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_low_precision_does_not_lose_small_steps(policy):
    precise, x, _ = BY_NAME["attention"].build("float32", steps=64, method="euler")
    layer, _, _ = BY_NAME["attention"].build(policy, steps=64, method="euler")
    layer.set_weights(precise.get_weights())
    y = layer(x)
    assert y.dtype == layer.compute_dtype
    # Roundings of inputs, kernels and the output; a state in bfloat16 would be off by 0.5.
    tolerance = 0.05 if policy == "mixed_bfloat16" else 0.01
    expected = numpy(precise(x))
    error = np.abs(numpy(ops.cast(y, "float32")) - expected).max()
    assert error <= tolerance * np.abs(expected).max()
    # The certificate is for the kernels rounded to the compute dtype.
    assert layer.lipschitz().value == pytest.approx(precise.lipschitz().value, rel=0.05)


@pytest.mark.parametrize("name", ["perceptron", "three depths"])
def test_saved_model_is_the_same_function(name, tmp_path):
    layer, x, _ = BY_NAME[name].build("float32")
    model = keras.Sequential([keras.Input((4, 4)), keras.layers.Masking(), layer])
    x[0, -1] = 0.0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    assert loaded.layers[-1].lipschitz() == layer.lipschitz()


def test_condensed_layer_certifies_what_it_runs_with():
    layer = kl.ContinuousDepth(attention("float32", lipschitz_bound=0.5), steps=2)
    model = keras.Sequential([keras.Input((4, 4)), layer])
    x = np.random.default_rng(0).normal(size=(1, 4, 4)).astype("float32")
    plain = numpy(model(x))
    outside = layer.lipschitz().value
    with kl.condensed(model):
        inside = layer.lipschitz().value
        found = jacobians.ascend(layer, x[0], "l2", steps=3)
        np.testing.assert_allclose(numpy(model(x)), plain, rtol=0, atol=0.02)
    assert found <= inside * (1.0 + 1e-6)
    assert outside <= inside * (1.0 + 1e-6) <= math.exp(0.5) * (1.0 + 1e-5)


def test_exported_model_is_the_condensed_flow(tmp_path):
    layer, x, _ = BY_NAME["attention"].build("float32", steps=1)
    model = keras.Sequential(
        [keras.Input((4, 4)), layer, keras.layers.GlobalAveragePooling1D(), kl.SpectralDense(3)]
    )
    certificate, path = kl.export_saved_model(model, tmp_path / "model")
    served = tf.saved_model.load(str(path))
    (output,) = served.signatures["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(output, numpy(model(x)), rtol=0, atol=1e-4)
    assert certificate.total == pytest.approx(kl.certify(model).total, rel=1e-3)


def test_every_kind_of_part_can_stand_in_a_branch():
    parts = [
        kl.PositionEmbedding(),
        kl.CenterNormalization(),
        attention("float32"),
        kl.MaxMin(),
        keras.layers.Activation("softplus"),
    ]
    layer = kl.ContinuousDepth(keras.Sequential(parts), time=0.2)
    x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
    assert np.isfinite(numpy(layer(x))).all()
    assert math.exp(0.2) > 1.0 < layer.lipschitz().value < 1e6


def test_certificate_knows_its_length():
    layer = kl.ContinuousDepth(attention("float32"))
    model = keras.Sequential([keras.Input((None, 4)), layer])
    unknown = kl.certify(model)
    assert math.isinf(unknown.total)
    assert "length" in unknown.rows[0].reason
    known = kl.certify(model, sequence_length=6)
    assert known.total == pytest.approx(layer.lipschitz(6).value, rel=1e-8)
    assert known.threat_model.max_tokens == 6
    assert layer.lipschitz(6).value < layer.lipschitz(60).value


def test_what_cannot_be_bounded_is_infinite_with_a_reason():
    layer, _, _ = BY_NAME["three depths"].build("float32")
    layer.branch[1].query_kernel.assign(np.full(layer.branch[1].query_kernel.shape, np.nan))
    for bound in (layer.lipschitz(), layer.reverse_lipschitz(), layer.flow_lipschitz()):
        assert math.isinf(bound.value)
        assert "NaN" in bound.reason
    layer, _, _ = BY_NAME["attention"].build(time=1e6, decay=1e3, steps=3)
    for bound in (layer.lipschitz(), layer.reverse_lipschitz(), layer.flow_lipschitz(reverse=True)):
        assert bound.value >= 0.0
    assert "largest float64" in layer.reverse_lipschitz().reason


BAD = {
    "zero time": (dict(time=0.0), "`time`.*Received: time=0.0"),
    "infinite time": (dict(time=math.inf), "`time`.*Received: time=inf"),
    "NaN time": (dict(time=math.nan), "`time`.*Received: time=nan"),
    "negative decay": (dict(decay=-1.0), "`decay`.*Received: decay=-1.0"),
    "NaN decay": (dict(decay=math.nan), "`decay`.*Received: decay=nan"),
    "unknown method": (dict(method="rk5"), "`method`.*Received: method='rk5'"),
    "no steps": (dict(steps=0), "`steps`.*Received: steps=0"),
    "half a step": (dict(steps=1.5), "`steps`.*Received: steps=1.5"),
    "no branch": (dict(branch=[]), r"`branch`.*Received: branch=\[\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        kl.ContinuousDepth(**{"branch": attention(), **arguments})


def test_bad_branches_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape of its input.*Received: \(None, 4, 5\)"):
        kl.ContinuousDepth(kl.SpectralDense(5)).build((None, 4, 4))
    with pytest.raises(ValueError, match=r"Received: .*dropout=0.1"):
        kl.ContinuousDepth(attention("float32", dropout=0.1)).build((None, 4, 4))
    with pytest.raises(ValueError, match=r"compute in float32.*Received: .*'float64'"):
        kl.ContinuousDepth(attention()).build((None, 4, 4))
    with pytest.raises(ValueError, match=r"Received: layer .* of class Dense"):
        kl.ContinuousDepth(keras.layers.Dense(4)).build((None, 4, 4))
    with pytest.raises(ValueError, match=r"static last axis.*Received"):
        kl.ContinuousDepth(attention("float32")).build((None, 4, None))
    layer = kl.ContinuousDepth(attention("float32"))
    for method in (layer.lipschitz, layer.reverse_lipschitz, layer.flow_lipschitz):
        with pytest.raises(ValueError, match="Received: built=False"):
            method()
    with pytest.raises(ValueError, match="Received: built=False"):
        layer.reverse(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"`norm`.*Received: norm='l3'"):
        layer.build((None, 4, 4))
        layer.lipschitz(norm="l3")
