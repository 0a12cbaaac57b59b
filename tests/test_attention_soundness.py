"""Certified bounds are attacked: no Jacobian of the layer, measured in float64, exceeds them."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import bounds_cases, jacobians
from helpers.layer_cases import CALLS, CAPS, FEATURES, LENGTH, Case, cases, randomize

import keras_lipattn as kl
from keras_lipattn.bounds import s_star

NORMS = ("l2", "token", "linf")
# float64 gradients of a softmax lose a few digits; the norms of Jacobians another one.
SLACK = 1.0 + 1e-9


def _attacks(case, layer, seed=0):
    """Examples that try to make the Jacobian large: structured ones as a head sees them, others."""
    rng = np.random.default_rng(seed)
    query = np.asarray(layer.query_kernel)[:, 0] / layer.key_dim**0.25
    shape = (*case.sides, FEATURES)
    back = np.linalg.pinv(query)
    witnesses = bounds_cases.inputs(max(2, case.tokens), layer.key_dim, rng)[::3]
    if case.tokens * FEATURES == np.prod(shape):
        yield from ((y[: case.tokens] @ back).reshape(shape) for y in witnesses)
    yield from (rng.normal(size=shape) * size for size in (0.3, 1.0, 3.0))
    # All tokens in one place, as every head sees it, and far away from there.
    yield np.full(shape, 7.0)


def _assert_sound(case, layer, xs, norms=NORMS):
    bounds = {norm: layer.lipschitz(norm=norm, mask=case.visible()).value for norm in norms}
    largest = dict.fromkeys(norms, 0.0)
    for x in xs:
        found = jacobians.norms(jacobians.jacobian(functools.partial(case.run_copies, layer), x))
        for norm in norms:
            largest[norm] = max(largest[norm], found[norm])
    for norm in norms:
        assert largest[norm] <= bounds[norm] * SLACK, (norm, largest[norm], bounds[norm])
    return largest, bounds


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain",)),
        *cases(options=("window", "value dim", "two axes"), calls=("no mask", "everything")),
        *cases(options=("one head", "output shapes", "first axis"), calls=("causal",)),
        *cases(options=("plain",), calls=("everything",), caps=CAPS),
        *cases(options=("plain",), calls=("no mask", "causal"), caps=("token",)),
        *cases(options=("window",), calls=("pairs",), caps=("both",)),
        *cases(options=("relative",), calls=("no mask", "causal", "pairs", "everything")),
        *cases(options=("relative, window", "relative, axes"), calls=("no mask", "causal")),
        *cases(options=("relative",), calls=("causal",), caps=CAPS),
    ],
    ids=str,
)
def test_no_jacobian_exceeds_the_bound(case):
    layer = case.layer()
    layer.condense()
    _assert_sound(case, layer, _attacks(case, layer))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("call", ["no mask", "causal", "pairs per head"])
def test_no_ascent_climbs_over_the_bound(call, norm):
    more = [("plain", "token"), ("relative", None)] if call == "causal" else []
    for options, cap in [("plain", None), *more]:
        case = Case(options, call, cap)
        layer = case.layer(scale=0.5)
        layer.condense()
        bound = layer.lipschitz(norm=norm, mask=case.visible()).value
        x = list(_attacks(case, layer))[2]
        run = functools.partial(case.run_copies, layer)
        start = jacobians.norms(jacobians.jacobian(run, x))[norm]
        best = jacobians.ascend(run, x, norm)
        assert start <= best <= bound * SLACK


def test_trained_weights_are_bounded_too():
    case = Case()
    layer = case.layer(scale=0.3)
    inputs = keras.Input((LENGTH, FEATURES), dtype="float64")
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, LENGTH, FEATURES))
    before = layer.lipschitz().value
    # Away from everything else: the layer has to become steep.
    model.fit(x, 9.0 * np.sign(x), epochs=20, verbose=0)
    largest, bounds = _assert_sound(case, layer, [*_attacks(case, layer), *x[:3]])
    assert bounds["l2"] > 2.0 * before
    assert largest["l2"] > before


@pytest.mark.parametrize("call", ["no mask", "causal", "query mask", "pairs"])
@pytest.mark.parametrize("cap", [None, "l2", "linf"])
def test_no_pair_of_inputs_is_torn_further_apart(call, cap):
    case = Case(call=call, cap=cap)
    layer = case.layer()
    rng = np.random.default_rng(0)
    measure = {
        "l2": lambda d: np.linalg.norm(d),
        "token": lambda d: np.linalg.norm(d, axis=-1).max(),
        "linf": lambda d: np.abs(d).max(),
    }
    bounds = {norm: layer.lipschitz(norm=norm, mask=case.visible()).value for norm in NORMS}
    base = np.repeat(rng.normal(size=(1, LENGTH, FEATURES)) * 2.0, 60, axis=0)
    steps = rng.normal(size=base.shape) * np.geomspace(1e-3, 10.0, 60)[:, None, None]
    outputs = [np.asarray(case.run_copies(layer, each)) for each in (base, base + steps)]
    for norm, bound in bounds.items():
        for moved, step in zip(outputs[1] - outputs[0], steps, strict=True):
            assert measure[norm](moved) <= bound * measure[norm](step) * SLACK


@pytest.mark.parametrize("tokens", [3, 5, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_the_constant_of_the_token_norm_is_attained(tokens, causal):
    layer = kl.L2MultiHeadAttention(
        1, 1, use_bias=False, kernel_initializer="ones", dtype="float64"
    )
    layer.build((1, tokens, 1))
    bound = layer.lipschitz(norm="token", mask="causal" if causal else "full").value
    # The last token in the center, the others half on each side: Theorem 4 of docs/theory.md.
    center = tokens - 1
    x = np.zeros((tokens, 1))
    x[:center:2], x[1:center:2] = 1.0, -1.0
    x *= np.sqrt(s_star(tokens - 1) + 1.5)
    jac = jacobians.jacobian(lambda x: layer(x, use_causal_mask=causal), x)
    attained = jacobians.norms(jac)["token"]
    assert bound == pytest.approx(1.0 + 4.0 * s_star(tokens - 1), rel=1e-7)
    assert attained == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask", ["full", "causal", "any"])
def test_the_bound_scales_as_the_function_does(norm, mask):
    layer = Case().layer(use_bias=False)
    x = np.random.default_rng(0).normal(size=(1, LENGTH, FEATURES))
    before, value = layer.lipschitz(norm=norm, mask=mask).value, layer(x)
    t = 7.0
    layer.query_kernel.assign(t * layer.query_kernel)
    # F_t(x / t) = t F(x): the Jacobian at x / t is t^2 times as large.
    np.testing.assert_allclose(layer(x / t), t * value, rtol=1e-9, atol=1e-12)
    # Two searches of scalings of the heads end a little apart.
    assert layer.lipschitz(norm=norm, mask=mask).value == pytest.approx(t**2 * before, rel=1e-4)
    layer.value_kernel.assign(-3.0 * layer.value_kernel)
    layer.output_kernel.assign(layer.output_kernel / 5.0)
    assert layer.lipschitz(norm=norm, mask=mask).value == pytest.approx(
        t**2 * 0.6 * before, rel=1e-4
    )


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_are_ordered(norm):
    layer = Case().layer()
    by_mask = [layer.lipschitz(norm=norm, mask=mask).value for mask in ("causal", "full", "any")]
    everything = np.ones((LENGTH, LENGTH), bool)
    alone = layer.lipschitz(norm=norm, mask=np.eye(LENGTH, dtype=bool)).value
    assert alone <= min(by_mask)
    assert max(by_mask) <= by_mask[2] * (1.0 + 1e-9)
    # Recognized as full.
    assert layer.lipschitz(norm=norm, mask=everything).value == pytest.approx(by_mask[1])
    lengths = [layer.lipschitz(n, norm=norm).value for n in (1, 2, LENGTH, 50)]
    assert lengths == sorted(lengths)
    assert lengths[2] == layer.lipschitz(norm=norm).value
    bound = layer.lipschitz(norm=norm)
    assert bound.kind == "certified" and bound.norm == norm and bound.theorem
    assert bound.published >= bound.value


def test_a_window_needs_no_length():
    layer = kl.L2MultiHeadAttention(2, 3, sliding_window=3)
    layer.build((None, None, FEATURES))
    wide, causal = layer.lipschitz(), layer.lipschitz(mask="causal")
    assert np.isfinite(wide.value) and causal.value <= wide.value
    assert wide.value == pytest.approx(layer.lipschitz(100_000).value)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("cap", [None, *CAPS])
def test_condensed_certificates_are_for_the_very_constants(cap, dtype):
    case = Case(cap=cap, dtype=dtype)
    layer = case.layer(scale=1.5)
    with kl.condensed(layer) as variables:
        assert len(variables) == 2
        outputs = {}
        for norm in NORMS:
            outputs[norm] = layer.lipschitz(norm=norm).value
        # The map of one token is linear: it shows the factor that is applied to the constants.
        b, c = (np.asarray(keras.ops.cast(v.value, "float64")) for v in variables)
        single = layer(np.eye(FEATURES)[:, None]) - layer(np.zeros((1, 1, FEATURES)))
    single = np.asarray(keras.ops.cast(single, "float64"))[:, 0]
    factor = np.vdot(single, b @ c) / np.vdot(b @ c, b @ c)
    heads = b.reshape(FEATURES, layer.num_heads, layer.key_dim).transpose(1, 0, 2)
    out = c.reshape(layer.num_heads, layer.key_dim, -1) * factor
    # One token is computed in the dtype of the layer, which is how well the factor is known.
    slack = {"float32": 1.0 + 1e-5, "mixed_bfloat16": 1.02, "mixed_float16": 1.005}[dtype]
    mask = np.ones((LENGTH, LENGTH), bool)
    for x in list(_attacks(Case(), layer))[::2]:
        jac = bounds_cases.jacobian(x, heads, out, mask)
        for norm, value in jacobians.norms(jac).items():
            assert value <= outputs[norm] * slack
    if layer.lipschitz_bound is not None:
        assert outputs[layer.lipschitz_norm] <= layer.lipschitz_bound


@pytest.mark.parametrize("call", CALLS)
def test_float32_stays_under_the_bound(call):
    case = Case(call=call, cap="both", dtype="float32")
    layer = case.layer()
    layer.condense()
    xs = [x.astype("float32") for x in list(_attacks(case, layer))[::3]]
    bound = layer.lipschitz(mask=case.visible()).value
    for x in xs:
        jac = jacobians.jacobian(functools.partial(case.run_copies, layer), x)
        # Gradients in float32, of inputs of size ten.
        assert jacobians.norms(jac)["l2"] <= bound * (1.0 + 1e-4)


def test_random_layers_of_every_size_are_bounded():
    rng = np.random.default_rng(0)
    for _ in range(8):
        heads, key, value, out, width, tokens = rng.integers(1, [4, 4, 4, 4, 5, 6])
        layer = kl.L2MultiHeadAttention(
            int(heads), int(key), int(value), output_shape=int(out), dtype="float64"
        )
        layer.build((1, int(tokens), int(width)))
        randomize(layer, scale=rng.choice([0.3, 1.0, 3.0]), seed=int(rng.integers(1000)))
        causal = bool(rng.integers(2))

        def run(x, layer=layer, causal=causal):
            return layer(x, use_causal_mask=causal)

        for size in (0.3, 1.0, 3.0):
            jac = jacobians.jacobian(run, rng.normal(size=(tokens, width)) * size)
            for norm, found in jacobians.norms(jac).items():
                mask = "causal" if causal else "full"
                assert found <= layer.lipschitz(norm=norm, mask=mask).value * SLACK


def test_the_jacobian_is_that_of_the_formula():
    layer = Case().layer()
    with kl.condensed(layer) as (b, c):
        heads = np.asarray(b).reshape(FEATURES, 2, 3).transpose(1, 0, 2)
        out = np.asarray(c).reshape(2, 3, -1)
    x = np.random.default_rng(0).normal(size=(LENGTH, FEATURES))
    expected = bounds_cases.jacobian(x, heads, out, np.ones((LENGTH, LENGTH), bool))
    found = jacobians.jacobian(layer, tf.constant(x).numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_the_bound_holds_for_folded_kernels_rounded_or_not(norm):
    for seed in range(4):
        # One head: no search for a scaling comes between the two numbers.
        layer = Case("one head", dtype="float32").layer(seed=seed)
        twin = Case("one head", dtype="float64").layer()
        for mine, theirs in zip(layer.kernels, twin.kernels, strict=True):
            theirs.assign(np.asarray(mine, np.float64))
        # The twin folds the same kernels without rounding the products.
        rounded, exact = layer.lipschitz(norm=norm).value, twin.lipschitz(norm=norm).value
        assert exact <= rounded <= exact * (1.0 + 1e-6)
