"""Scaled cosine attention computes its formula, leaks nothing, and is a layer like the others."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import contextlib
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import loop_attention, loop_cosine
from helpers.layer_cases import BATCH, CAPS, COMMON_OPTIONS, FEATURES, LENGTH, Case, cases

import keras_lipattn as kl
from keras_lipattn.layers import Tracking

ONE_CAP = [cap for cap in CAPS if cap != "both"]
# Relative to the largest output, or to 1: roundings of three projections and of the weights.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "mixed_bfloat16": 0.1, "mixed_float16": 0.02}


def _case(*args, **fields):
    return Case(*args, **fields, kind=kl.ScaledCosineAttention)


def _numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float64"))


def _expected(case, layer, x):
    kernels, biases = loop_cosine.weights(layer)
    attend = loop_cosine.attending(layer.temperature, layer.epsilon)
    x = _numpy(keras.ops.cast(x, layer.compute_dtype))
    arguments = case.loop_arguments()
    return loop_attention.attend_over_axes(x, kernels, biases, **arguments, attend=attend)


def _close(found, expected, dtype):
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(_numpy(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain",), kind=kl.ScaledCosineAttention),
        *cases(
            options=[name for name in COMMON_OPTIONS if name != "plain"],
            calls=("causal", "everything"),
            kind=kl.ScaledCosineAttention,
        ),
        *cases(
            options=("plain",),
            calls=("everything",),
            dtypes=("float32", "mixed_bfloat16", "mixed_float16"),
            kind=kl.ScaledCosineAttention,
        ),
    ],
    ids=str,
)
def test_output_and_scores_equal_the_loops(case):
    layer, x = case.layer(temperature=2.5, epsilon=0.3), case.inputs()
    expected, scores = _expected(case, layer, x)
    assert case.run(layer, x).dtype == layer.compute_dtype
    _close(case.run(layer, x), expected, case.dtype)
    both = case.run(layer, x, return_attention_scores=True)
    _close(both[0], expected, case.dtype)
    _close(both[1], scores, case.dtype)


@pytest.mark.parametrize("cap", ONE_CAP)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_caps_hold_and_condensing_changes_nothing(cap, dtype):
    case = _case(cap=cap, dtype=dtype)
    layer, x = case.layer(scale=1.5), case.inputs()
    loose, tight = case.run(layer, x), 0.0
    layer.condense()
    remembered = case.run(layer, x)
    with kl.condensed(layer) as variables:
        assert len(variables) == 2
        constants = case.run(layer, x)
        if layer.lipschitz_bound is not None:
            tight = layer.lipschitz(norm=layer.lipschitz_norm).value
            assert tight <= layer.lipschitz_bound
    # Gram iteration shrinks by one part in a thousand too much; bfloat16 rounds to 8 bits.
    slack = 3e-3 if dtype == "float32" else 0.05
    np.testing.assert_allclose(_numpy(loose), _numpy(constants), rtol=0, atol=slack)
    slack = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(_numpy(remembered), _numpy(constants), rtol=0, atol=slack)
    if layer.spectral_norm is not None:
        weights = layer.host_weights().exact
        for kernel in (weights.query, weights.key, weights.value, weights.output):
            for head in kernel:
                assert np.linalg.norm(head, 2) <= layer.spectral_norm
    else:
        # The cap does not shrink by much more than it must.
        assert tight >= 0.6 * CAPS[cap]["lipschitz_bound"]


def test_both_caps_at_once_are_refused():
    with pytest.raises(ValueError, match=r"Received: spectral_norm=1.0, lipschitz_bound=2.0"):
        kl.ScaledCosineAttention(2, 3, spectral_norm=1.0, lipschitz_bound=2.0)


@pytest.mark.parametrize("name", ["temperature", "epsilon"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, None, "1"])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be.*Received: {name}="):
        kl.ScaledCosineAttention(2, 3, **{name: value})


def test_any_other_tensor_is_cross_attention():
    layer = kl.ScaledCosineAttention(2, 3)
    x = np.ones((2, LENGTH, FEATURES), "float32")
    for name in ("value", "key"):
        with pytest.raises(ValueError, match=f"`{name}` must be omitted.*Received: {name}="):
            layer(x, **{name: x + 1.0})
    np.testing.assert_array_equal(layer(x, x, x), layer(x))
    np.testing.assert_array_equal(layer(x, value=x), layer(x))


def test_a_cap_needs_a_length_and_keeps_it():
    layer = kl.ScaledCosineAttention(2, 3, lipschitz_bound=1.0)
    with pytest.raises(ValueError, match=r"needs the number of tokens.*Received: query_shape"):
        layer.build((None, None, FEATURES))
    layer = kl.ScaledCosineAttention(2, 3, lipschitz_bound=1.0)
    x = np.ones((1, LENGTH + 1, FEATURES), "float32")
    layer(x[:, 1:])
    with pytest.raises(ValueError, match=f"Received: an input of {LENGTH + 1} tokens"):
        layer(x)


# Paths through the layer.
PATHS = ("plain", "capped", "condensed", "window", "training", "graph")


@pytest.fixture(params=PATHS)
def path(request):
    """A layer with random weights, and a function that runs it on this path."""
    name = request.param
    cap = "l2" if name in ("capped", "condensed") else None
    layer = _case("window" if name == "window" else "plain", cap=cap, dtype="float32").layer()
    called = tf.function(layer) if name == "graph" else layer

    def run(x, **call):
        return called(tf.convert_to_tensor(x), training=name == "training", **call)

    with kl.condensed(layer) if name == "condensed" else contextlib.nullcontext():
        yield run


def _changed(x, where, value):
    other = x.copy()
    other[where] = value
    return other


def test_what_a_token_may_not_see_does_not_reach_it(path):
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, FEATURES)).astype("float32")
    before = path(x, use_causal_mask=True)
    for value, first in zip((0.5, 100.0, 1e30), (LENGTH - 1, 1, 2), strict=True):
        after = path(_changed(x, np.s_[:, first:], value), use_causal_mask=True)
        np.testing.assert_array_equal(after[:, :first], before[:, :first])
        assert not np.allclose(after[:, first:], before[:, first:])
    valid = np.array([[True, False, True, True, False], [False, True, True, False, True]])
    for mask, causal in (("query_mask", False), ("value_mask", True), ("key_mask", False)):
        before = path(x, use_causal_mask=causal, **{mask: valid})
        np.testing.assert_array_equal(before[~valid], 0.0)
        for value in (0.5, 1e30, np.inf, np.nan):
            after = path(_changed(x, ~valid, value), use_causal_mask=causal, **{mask: valid})
            np.testing.assert_array_equal(after, before)
    pairs = np.eye(LENGTH, dtype=bool)
    pairs[0, 3] = True
    before = np.asarray(path(x, attention_mask=pairs))
    after = np.asarray(path(_changed(x, np.s_[:, 3], 50.0), attention_mask=pairs))
    # A window of two hides the one pair that is not on the diagonal.
    np.testing.assert_array_equal(after[:, [1, 2, 4]], before[:, [1, 2, 4]])


@pytest.mark.parametrize("cap", [None, "token", "spectral"])
def test_models_train_and_reload_bit_for_bit(tmp_path, cap):
    layer = _case(cap=cap, dtype="float32").layer(temperature=3.0, epsilon=0.5)
    model = keras.Sequential([keras.Input((LENGTH, FEATURES)), layer, kl.SpectralDense(2)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, LENGTH, FEATURES)).astype("float32")
    y = np.tanh(x[..., :2])
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded: keras.Model = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.layers[0].get_config() == layer.get_config()
    assert loaded.layers[0].lipschitz().value == layer.lipschitz().value


def test_config_holds_every_argument():
    for option in COMMON_OPTIONS:
        layer = _case(option).layer(epsilon=0.2, temperature=7.0)
        copy = kl.ScaledCosineAttention.from_config(layer.get_config())
        assert copy.get_config() == layer.get_config()
        assert (copy.epsilon, copy.temperature) == (0.2, 7.0)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("cap", [None, *ONE_CAP])
def test_the_running_bound_approaches_the_certified_one(cap, norm):
    case = _case(cap=cap)
    layer, x = case.layer(), case.inputs()
    exact = layer.lipschitz(norm=norm).value
    layer.tracking = Tracking(norm=norm)

    @tf.function
    def train():
        for _ in tf.range(60):
            layer(x, training=True)

    train()
    # One scaling of the heads instead of the best one, two norms instead of one of both parts.
    assert exact * (1.0 - 1e-5) <= float(layer.running_bound) <= 1.5 * exact
    graph = float(layer.graph_bound(norm=norm))
    assert exact * (1.0 - 1e-5) <= graph <= 1.5 * exact


def test_a_monitor_sees_it_and_its_penalty_lowers_the_bound():
    layer = _case(dtype="float32").layer()
    model = keras.Sequential([keras.Input((LENGTH, FEATURES)), layer])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    before = layer.lipschitz().value
    x = np.random.default_rng(0).normal(size=(16, LENGTH, FEATURES)).astype("float32")
    monitor = kl.LipschitzMonitor(penalty=1.0, target=before / 4.0)
    logs = model.fit(x, x, epochs=15, verbose=0, callbacks=[monitor]).history
    assert logs[f"lipschitz_{layer.name}"][-1] == pytest.approx(layer.lipschitz().value)
    assert layer.lipschitz().value < 0.6 * before


def test_it_is_exported_with_its_certificate(tmp_path):
    layer = _case(cap="l2", dtype="float32").layer()
    inputs = keras.Input((LENGTH, FEATURES))
    x = layer(inputs, use_causal_mask=True)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(x)))
    certificate, path = kl.export_saved_model(model, tmp_path / "model")
    assert certificate.total == pytest.approx(kl.certify(model).total, rel=1e-3)
    x = np.random.default_rng(0).normal(size=(4, LENGTH, FEATURES)).astype("float32")
    served = tf.saved_model.load(str(path)).signatures["serving_default"](tf.constant(x))
    # Served with constants: without the thousandth that Gram iteration shrinks too much.
    np.testing.assert_allclose(next(iter(served.values())), model(x), rtol=0, atol=3e-3)


def test_certify_asks_the_layer_with_the_mask_of_the_graph():
    layer = _case().layer()
    inputs = keras.Input((LENGTH, FEATURES), dtype="float64")
    pairs = np.eye(LENGTH, dtype=bool)
    for call, mask in (
        ({}, "full"),
        ({"use_causal_mask": True}, "causal"),
        ({"attention_mask": pairs}, pairs),
    ):
        for norm in ("l2", "token", "linf"):
            total = kl.certify(keras.Model(inputs, layer(inputs, **call)), norm=norm).total
            assert total == pytest.approx(layer.lipschitz(norm=norm, mask=mask).value)
    scores = _case().layer()(inputs, return_attention_scores=True)
    assert kl.certify(keras.Model(inputs, scores)).total == math.inf
    free = kl.ScaledCosineAttention(2, 3)
    inputs = keras.Input((None, FEATURES))
    # Where all see all, columns are bounded whatever the length.
    assert math.isfinite(kl.certify(keras.Model(inputs, free(inputs))).total)
    unknown = keras.Model(inputs, free(inputs, use_causal_mask=True))
    assert kl.certify(unknown).total == math.inf
    assert "sequence_length" in str(kl.certify(unknown))
    assert math.isfinite(kl.certify(unknown, sequence_length=9).total)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_have_no_constant(value):
    for name in ("query_kernel", "output_kernel", "key_bias", "output_bias"):
        layer = _case().layer()
        weight = getattr(layer, name)
        broken = np.copy(weight)
        broken.flat[0] = value
        weight.assign(broken)
        bound = layer.lipschitz()
        assert bound.value == math.inf and "NaN or infinite" in bound.reason
