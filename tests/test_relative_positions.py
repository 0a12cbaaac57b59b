"""Biases by relative position: what they do to attention, and what they cost its constant."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import bounds_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from scipy.special import lambertw

import keras_lipattn as kl
from keras_lipattn.bounds.key_weights import (
    KeyWeights,
    biases_by_lag,
    log_lambert,
    seen_by_lag,
    weighted_constants,
    weighted_unit_bound,
    weights_by_lag,
    weights_by_pair,
)
from keras_lipattn.bounds.mild_weights import mild_constants
from keras_lipattn.bounds.unit_head import unit_head_bound, weighted_bound
from keras_lipattn.layers._masks import mask_class

NORMS = ("l2", "token", "linf")
MASKS = ("full", "causal")


def layer_with(table, *, features=4, tokens=6, key_dim=3, **options):
    """A layer with given biases `(H, 2 R)` and random kernels."""
    table = np.asarray(table, "float64")
    heads, sides = table.shape
    options = {"dtype": "float64", "max_relative_position": sides // 2, **options}
    layer = kl.L2MultiHeadAttention(heads, key_dim, **options)
    layer.build((None, tokens, features))
    rng = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(rng.normal(size=weight.shape))
    layer.relative_bias.assign(table)
    return layer


def kernels_of(layer):
    return [layer.query_kernel, layer.value_kernel, layer.output_kernel, layer.output_bias]


def brute_force(table, tokens, mask, window):
    """The four sums of every head, from the definition."""
    found = []
    for biases in table:
        reach = len(biases) // 2
        weights = np.zeros((tokens, tokens))
        for i in range(tokens):
            for j in range(tokens):
                lag = i - j
                hidden = (mask == "causal" and lag < 0) or (window and abs(lag) >= window)
                if lag == 0 or hidden:
                    continue
                place = reach - 1 + min(lag, reach) if lag > 0 else reach - min(-lag, reach)
                weights[i, j] = math.exp(biases[place])
        scores = lambertw(weights / math.e).real
        found.append(
            (
                np.log(weights.sum(axis=1).max()),
                np.log(weights.sum(axis=0).max()),
                (weights / (1.0 + weights)).sum(axis=0).max(),
                scores.sum(axis=0).max(),
            )
        )
    return np.transpose(found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(2, 9),
    reach=st.integers(1, 10),
    window=st.none() | st.integers(2, 10),
    mask=st.sampled_from(MASKS),
    size=st.floats(0.1, 8.0),
)
def test_sums_are_those_of_the_definition(seed, tokens, reach, window, mask, size):
    table = size * np.random.default_rng(seed).normal(size=(2, 2 * reach))
    expected = brute_force(table, tokens, mask, window)
    seen = seen_by_lag(table, tokens, mask == "causal", window, np)
    np.testing.assert_allclose(weights_by_lag(*seen, tokens, np), expected, rtol=1e-9, atol=1e-9)
    in_graph = seen_by_lag(ops.convert_to_tensor(table), tokens, mask == "causal", window, ops)
    in_graph = weights_by_lag(*in_graph, tokens, ops)
    np.testing.assert_allclose(in_graph, expected, rtol=1e-9, atol=1e-9)
    # Without a length there may be any number of tokens, within the window.
    if window:
        seen = seen_by_lag(table, None, mask == "causal", window, np)
        endless = np.array(weights_by_lag(*seen, None, np))
        assert (endless >= expected - 1e-9).all()
        long = brute_force(table, 2 * window + 1, mask, window)
        np.testing.assert_allclose(endless, long, rtol=1e-9, atol=1e-9)
    if mask == "full" and not window:
        pairs = weights_by_pair(np.zeros((1, tokens)), table)
        np.testing.assert_allclose(pairs, expected, rtol=1e-9, atol=1e-9)


def test_degrees_of_a_mask_lower_the_sums():
    table = np.random.default_rng(0).normal(size=(3, 8))
    seen = seen_by_lag(table, 9, False, None, np)
    all_of_them = weights_by_lag(*seen, 9, np)
    few = weights_by_lag(*seen, 9, np, n_keys=2, n_queries=1)
    peak = table.max(axis=1)
    np.testing.assert_allclose(few.log_keys, np.minimum(all_of_them.log_keys, peak + math.log(2)))
    np.testing.assert_allclose(few.log_queries, np.minimum(all_of_them.log_queries, peak))
    assert (few.columns < all_of_them.columns).all()
    assert (few.entropies < all_of_them.entropies).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_lambert_is_bounded_from_above(dtype):
    x = np.linspace(-59.0, 300.0, 20_001).astype(dtype)
    exact = lambertw(np.exp(x.astype("float64"))).real
    found = np.asarray(log_lambert(ops.convert_to_tensor(x), ops), "float64")
    # Roundings of the dtype, which the bounds have an allowance for, and of exp in the reference.
    rounding = 10.0 * np.finfo(dtype).eps + 1e-13
    assert (found >= exact * (1.0 - rounding)).all()
    assert (found <= exact * (1.0 + rounding)).all()
    assert log_lambert(np.array([1e4, -1e4]), np).tolist() == pytest.approx([9990.8, 8.8e-27], 1e-2)


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"training": True}])
def test_biases_begin_as_none(call):
    x = np.random.default_rng(0).normal(size=(2, 6, 4))
    plain = kl.L2MultiHeadAttention(2, 3, dtype="float64")
    relative = kl.L2MultiHeadAttention(2, 3, max_relative_position=2, dtype="float64")
    expected = plain(x, **call)
    relative(x)
    for ours, weight in zip(kernels_of(relative), kernels_of(plain), strict=True):
        ours.assign(weight)
    np.testing.assert_allclose(relative(x, **call), expected, rtol=1e-12)


def test_a_head_can_hear_the_token_before_louder_than_itself():
    layer = layer_with([[-30.0, -30.0, 8.0, -30.0]])
    x = np.random.default_rng(0).normal(size=(1, 6, 4)) * 0.1
    _, weights = layer(x, use_causal_mask=True, return_attention_scores=True)
    assert (np.diagonal(weights[0, 0], offset=-1) > 0.99).all()
    plain = layer_with([[0.0, 0.0]])
    _, weights = plain(x, use_causal_mask=True, return_attention_scores=True)
    assert (np.diagonal(weights[0, 0])[1:] >= np.diagonal(weights[0, 0], offset=-1)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_constant_of_no_biases_is_that_of_equal_weights(norm, mask):
    zero, tokens = np.zeros((2, 4)), 9
    seen = seen_by_lag(zero, tokens, mask == "causal", None, np)
    unit = weighted_unit_bound(weights_by_lag(*seen, tokens, np), norm, np)
    plain = unit_head_bound(tokens, "any", norm)
    if norm == "l2":
        assert np.max(unit.value) >= plain.value
    else:
        # Up to the slack for roundings in graphs.
        np.testing.assert_allclose(unit.value, plain.value, rtol=2e-5)
    certified = layer_with(zero, tokens=tokens).lipschitz(norm=norm, mask=mask)
    free = layer_with(zero, tokens=tokens)
    free.relative_bias = None
    # One scaling of the heads less.
    assert certified.value == pytest.approx(free.lipschitz(norm=norm, mask=mask).value, rel=1e-4)


def mild(table, mask, tokens=None, window=None):
    """Theorems 3.E and 3.F for one head."""
    known = mask_class(mask, sliding_window=window)
    seen = seen_by_lag(table, tokens, known.causal, window, np)
    degrees = dict(n_keys=known.n_keys, n_queries=known.n_queries)
    weights = weights_by_lag(*seen, tokens, np, **degrees)
    totals = np.exp(weights.log_keys)
    found = mild_constants(*seen, tokens, totals, known.arguments(tokens))
    return weighted_constants(weights, "l2")[0], found[0]


def test_mild_biases_cost_little():
    constant = np.full((1, 8), 0.5)
    assert mild(constant, "full", 1024)[0] > 72.0
    assert mild(constant, "full", 1024)[1] < 19.8
    assert mild(np.zeros((1, 8)), "full", 1024)[1] == unit_head_bound(1024).value
    for mask in MASKS:
        for window in (None, 9):
            tokens = 200 if window is None else None
            none = mild(np.zeros((1, 8)), mask, tokens, window)[1]
            small = np.full((1, 8), 1e-7)
            small[0, 3] = 0.0
            # The formula for weights tends to the one without.
            assert mild(small, mask, tokens, window)[1] == pytest.approx(none, rel=5e-3)
            # Extreme biases are left to Theorem 3.E.
            extreme = 30.0 * np.random.default_rng(0).normal(size=(1, 8))
            assert mild(extreme, mask, tokens, window)[1] == math.inf
            assert mild(np.full((1, 8), math.nan), mask, tokens, window)[1] == math.inf


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_no_jacobian_exceeds_the_constant_of_mild_biases(mask, window):
    tokens, rng = 12, np.random.default_rng(0)
    lag = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    visible = (abs(lag) < (window or tokens)) & ((lag >= 0) | (mask == "full"))
    b, c = bounds_cases.unit_head(2)
    for scale in (0.1, 0.5, 1.0, 2.0):
        table = scale * rng.normal(size=(1, 6))
        weights = np.exp(biases_by_lag(table, lag)[0]) * visible
        bound = min(mild(table, mask, tokens, window))
        for y in bounds_cases.inputs(tokens, 2, rng):
            # A mask of weights: scores are its logarithms minus squared distances.
            jac = bounds_cases.jacobian(y, b, c, weights)
            assert bounds_cases.attained(jac, "l2")[0] <= bound * (1 + 1e-9)


@pytest.mark.parametrize("xp", [np, ops])
def test_what_graphs_know_is_above_the_theorem_and_close(xp):
    totals = np.linspace(-6.0, 13.0, 77)
    logs = totals if xp is np else ops.convert_to_tensor(totals.astype("float32"))
    few, many = 0.0 * logs + 1.0, 0.0 * logs + 1e6
    tight = weighted_unit_bound(KeyWeights(logs, logs, few, few), "l2", xp).value
    above = weighted_unit_bound(KeyWeights(logs, logs, many, many), "l2", xp).value
    above = np.asarray(above, "float64")
    exact = np.array([weighted_bound(math.exp(n), math.exp(n)) for n in totals])
    inside = (totals > -4.0) & (totals < 11.5)
    assert (above >= exact).all()
    # A step of the points, over which the constant grows by 7 % at most, and its slack.
    assert (above[inside] <= 1.08 * exact[inside]).all()
    # The closed form is the smaller one where few keys have all the weight.
    assert (np.asarray(tight, "float64") <= above).all()
    assert (np.asarray(tight, "float64") < 0.5 * above).any()


@pytest.mark.parametrize("norm", NORMS)
def test_biases_that_fall_make_the_constant_one_of_any_length(norm):
    reach = 40
    slope = -0.5 * np.arange(1, reach + 1)
    layer = layer_with([np.concatenate([slope[::-1], slope])], tokens=10)
    at = {n: layer.lipschitz(n, norm=norm).value for n in (2, 20, 40, 80, 1000)}
    assert at[2] < at[20] <= at[40]
    assert at[1000] == pytest.approx(at[40], rel=1e-4)
    plain = layer_with(np.zeros((1, 2)), tokens=10)
    assert at[1000] < 0.5 * plain.lipschitz(1000, norm=norm).value


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("window", [None, 3])
def test_constants_grow_with_the_length_and_with_every_bias(norm, window):
    table = np.random.default_rng(1).normal(size=(2, 6))
    layer = layer_with(table, sliding_window=window)
    values = [layer.lipschitz(n, norm=norm, mask="causal").value for n in (1, 2, 3, 5, 9, 40)]
    # Another length may have found other parameters of the theorem, a thousandth worse.
    assert all(a <= b * 1.002 for a, b in itertools.pairwise(values))
    before = layer.lipschitz(norm=norm).value
    layer.relative_bias.assign(table + 0.7)
    assert layer.lipschitz(norm=norm).value > before


def test_a_loud_neighbor_costs_a_logarithm():
    quiet = -30.0
    values = []
    for bias in (0.0, 10.0, 20.0, 40.0, 80.0):
        layer = layer_with([[quiet, quiet, bias, quiet]], tokens=64)
        values.append(layer.lipschitz(norm="token", mask="causal").value)
    steps = np.diff(values) / np.diff([0.0, 10.0, 20.0, 40.0, 80.0])
    # `4 W0(exp(b - 3/2))` has slope at most 4 per unit of `b`, here times the same kernels.
    assert (np.diff(steps) > 0.0).all()
    assert steps[-1] <= 4.0 * values[0]


@pytest.mark.parametrize("norm", NORMS)
def test_a_penalty_of_the_constant_reaches_the_biases(norm):
    layer = layer_with(np.random.default_rng(2).normal(size=(2, 6)))

    def bound():
        return layer.graph_bound(norm=norm, mask="causal")

    with tf.GradientTape() as tape:
        value = bound()
    slope = tape.gradient(value, layer.relative_bias.value).numpy()
    assert np.abs(slope).max() > 0.0
    # Later keys are hidden.
    np.testing.assert_array_equal(slope[:, :3], 0.0)
    table, move = np.asarray(layer.relative_bias), 1e-6 * slope
    ends = []
    for sign in (1.0, -1.0):
        layer.relative_bias.assign(table + sign * move)
        ends.append(float(bound()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(np.sum(slope**2), rel=1e-5)


@pytest.mark.parametrize("tokens", [100, 5000])
def test_sums_of_long_sequences_are_from_above_in_float32(tokens):
    # Small weights in float32: each sum loses them one by one unless it is careful.
    for bias in (-1.0, -10.0, -16.5):
        table = np.full((1, 6), bias)
        exact = weights_by_lag(*seen_by_lag(table, tokens, False, None, np), tokens, np)
        single = ops.convert_to_tensor(table.astype("float32"))
        seen = seen_by_lag(single, tokens, False, None, ops)
        found = weights_by_lag(*seen, tokens, ops, epsilon=2.0**-23)
        for name, low, high in zip(exact._fields, exact, found, strict=True):
            size = max(1e-3, float(np.abs(low).max()))
            gap = (np.asarray(high, "float64") - low).max() / size
            assert -2e-7 < gap < 1e-4, name


def test_any_length_takes_no_time():
    layer = layer_with(np.random.default_rng(0).normal(size=(2, 6)))
    far = [layer.lipschitz(n, norm="token").value for n in (10**6, 10**12)]
    assert far[0] < far[1] < 3.0 * far[0]


def relative_model(**options):
    inputs = keras.Input((6, 4))
    y = kl.L2MultiHeadAttention(2, 3, max_relative_position=3, **options)(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(y))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_capped_models_train_and_predict(norm, jit_compile):
    model = relative_model(lipschitz_bound=0.5, lipschitz_norm=norm)
    monitor = kl.LipschitzMonitor(norm, penalty=0.1, target=0.2)
    model.compile("adam", "mse", jit_compile=jit_compile)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6, 4)).astype("float32"), rng.normal(size=(16, 4))
    layer = model.layers[1]
    layer.relative_bias.assign(rng.normal(size=(2, 6)))
    before = np.asarray(layer.relative_bias)
    model.fit(x, y, epochs=2, batch_size=8, callbacks=[monitor], verbose=0)
    assert np.abs(np.asarray(layer.relative_bias) - before).max() > 1e-4
    assert layer.lipschitz(norm=norm).value <= 0.5
    # Two steps behind the weights, and a graph's formula.
    assert 0.3 < float(layer.running_bound) < 0.6
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), rtol=1e-4, atol=1e-5)


def test_biases_that_are_not_finite_show_in_the_output_of_a_capped_layer():
    layer = layer_with([[0.0, math.nan, 1.0, 0.0]], lipschitz_bound=0.5)
    x = np.random.default_rng(0).normal(size=(1, 6, 4))
    for run in (layer, tf.function(layer, autograph=False)):
        assert np.isnan(run(x)).any()


@pytest.mark.parametrize("norm", NORMS)
def test_condensing_does_not_change_what_a_graph_divides_by(norm):
    layer = layer_with([[2.0, 1.0, 3.0, -1.0], [0.0, -2.0, 5.0, 0.0]], tokens=12)
    for mask in MASKS:
        graph = float(layer.graph_bound(norm=norm, mask=mask))
        with kl.condensed(layer):
            # Norms from Gram iteration exceed the exact ones by a thousandth.
            assert layer.graph_bound(norm=norm, mask=mask) == pytest.approx(graph, rel=2e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_a_cap_counts_the_biases(norm):
    table = np.array([[2.0, 1.0, 3.0, -1.0], [0.0, -2.0, 5.0, 0.0]])
    layer = layer_with(table, lipschitz_bound=0.5, lipschitz_norm=norm)
    free = layer_with(table)
    assert free.lipschitz(norm=norm).value > 1.0
    for mask in MASKS:
        assert layer.lipschitz(norm=norm, mask=mask).value <= 0.5
        assert layer.lipschitz(norm=norm, mask=mask).value >= 0.25
    x = np.random.default_rng(0).normal(size=(1, 6, 4))
    small = layer(x)
    layer.relative_bias.assign(table + 2.0)
    assert layer.lipschitz(norm=norm).value <= 0.5
    assert not np.allclose(layer(x), small)


@pytest.mark.parametrize("cap", [None, 0.3])
def test_a_condensed_layer_keeps_its_biases(cap):
    table = np.array([[2.0, 1.0, 3.0, -1.0], [0.0, -2.0, 5.0, 0.0]])
    layer = layer_with(table, lipschitz_bound=cap)
    x = np.random.default_rng(0).normal(size=(1, 6, 4))
    before, bound = layer(x), layer.lipschitz().value
    with kl.condensed(layer):
        inside = tf.function(lambda x: layer(x), autograph=False)(x)
        # Caps of the graph come from Gram iteration, a thousandth below the exact ones.
        np.testing.assert_allclose(inside, before, rtol=2e-3)
        layer.relative_bias.assign(-table)
        np.testing.assert_array_equal(tf.function(layer, autograph=False)(x), inside)
        assert layer.lipschitz().value == bound
    assert not np.allclose(layer(x), before)


def test_without_a_length_the_reason_is_told():
    layer = kl.L2MultiHeadAttention(1, 2, max_relative_position=2)
    layer.build((None, None, 4))
    assert "number of tokens is not known" in layer.lipschitz().reason
    assert math.isfinite(layer.lipschitz(7).value)
    windowed = kl.L2MultiHeadAttention(1, 2, max_relative_position=2, sliding_window=4)
    windowed.build((None, None, 4))
    assert math.isfinite(windowed.lipschitz().value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_biases_that_are_not_finite_have_no_constant(bad):
    layer = layer_with([[0.0, bad, 1.0, 0.0]])
    for norm in NORMS:
        bound = layer.lipschitz(norm=norm)
        assert math.isinf(bound.value)
        assert bound.reason == "the relative bias holds NaN or infinite entries"


@pytest.mark.parametrize("norm", NORMS)
def test_huge_biases_have_a_constant_or_a_reason(norm):
    for size in (90.0, 500.0, 1e4):
        layer = layer_with([[0.0, -size, size, 0.0]])
        bound = layer.lipschitz(norm=norm)
        assert math.isfinite(bound.value)
        # Float32 graphs hold the logarithm.
        single = layer_with([[0.0, -size, size, 0.0]], dtype="float32")
        graph = float(single.graph_bound(norm=norm))
        assert bound.value * (1.0 - 1e-4) <= graph < 2.5 * bound.value


def test_a_model_with_relative_positions_is_certified_saved_and_loaded(tmp_path):
    inputs = keras.Input((6, 4))
    attention = kl.L2MultiHeadAttention(2, 3, max_relative_position=4, sliding_window=5)
    model = keras.Model(inputs, attention(inputs, use_causal_mask=True))
    table = np.random.default_rng(0).normal(size=(2, 8))
    attention.relative_bias.assign(table)
    certificate = kl.certify(model)
    assert certificate.rows[0].theorem == "Theorem 5.1 with Theorem 3.E"
    expected = attention.lipschitz(6, mask="causal").value
    assert certificate.total == pytest.approx(expected, rel=1e-8)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert kl.certify(loaded).total == certificate.total
    x = np.random.default_rng(1).normal(size=(2, 6, 4)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))


def test_bad_reach_is_refused():
    for reach in (0, -1, 1.5, "far"):
        with pytest.raises(ValueError, match="Received: max_relative_position="):
            kl.L2MultiHeadAttention(1, 2, max_relative_position=reach)
