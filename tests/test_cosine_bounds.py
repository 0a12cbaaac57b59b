"""Theorem 7.3: no Jacobian of scaled cosine attention exceeds its bounds, and they are ordered."""

import functools
import itertools
import math

import numpy as np
import pytest
from helpers import jacobians
from helpers.layer_cases import FEATURES, LENGTH, Case, cases

import keras_lipattn as kl
from keras_lipattn.bounds.column_sums import column_mass
from keras_lipattn.bounds.cosine import certified_cosine_bound, fold
from keras_lipattn.linalg import SAFETY, operator_norm

NORMS = ("l2", "token", "linf")
# float64 gradients of a softmax lose a few digits; the norms of Jacobians another one.
SLACK = 1.0 + 1e-9


def _layer(case, rng, **options):
    """A layer whose kernels are of sizes far apart, which decides what the bound consists of."""
    options = {
        "temperature": rng.choice([0.3, 2.0, 6.0]),
        "epsilon": rng.choice([0.05, 1.0]),
    } | options
    layer = case.layer(seed=int(rng.integers(1000)), **options)
    for kernel in layer.kernels:
        kernel.assign(kernel * rng.choice([0.1, 1.0, 4.0]))
    if rng.integers(2):
        # Around the origin, where normalizing is steepest.
        for bias in (layer.query_bias, layer.key_bias, layer.value_bias):
            if bias is not None:
                bias.assign(0.0 * bias)
    return layer


def _attacks(layer, shape, rng):
    yield from (rng.normal(size=shape) * size for size in (0.03, 0.3, 3.0))
    yield np.zeros(shape)
    # All tokens but one in two opposite places, far away, the last one at the origin.
    poles = rng.choice([-30.0, 30.0], size=(*shape[:-1], 1)) * rng.normal(size=shape[-1:])
    poles.reshape(-1, shape[-1])[-1] = 0.0
    yield poles


@pytest.mark.parametrize(
    "case",
    [
        *cases(options=("plain",), kind=kl.ScaledCosineAttention),
        *cases(
            options=("window", "value dim", "two axes"),
            calls=("everything",),
            kind=kl.ScaledCosineAttention,
        ),
        *cases(
            options=("plain",),
            calls=("causal",),
            caps=("l2", "token", "linf", "spectral"),
            kind=kl.ScaledCosineAttention,
        ),
    ],
    ids=str,
)
def test_no_jacobian_exceeds_the_bound(case):
    rng = np.random.default_rng(len(str(case)))
    for _ in range(2):
        layer = _layer(case, rng)
        layer.condense()
        bounds = {norm: layer.lipschitz(norm=norm, mask=case.visible()).value for norm in NORMS}
        run = functools.partial(case.run_copies, layer)
        for x in _attacks(layer, (*case.sides, FEATURES), rng):
            for norm, found in jacobians.norms(jacobians.jacobian(run, x)).items():
                assert found <= bounds[norm] * SLACK


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("call", ["no mask", "causal"])
def test_no_ascent_climbs_over_the_bound(call, norm):
    case = Case("one head", call, kind=kl.ScaledCosineAttention)
    layer = case.layer(temperature=3.0)
    bound = layer.lipschitz(norm=norm, mask=case.visible()).value
    run = functools.partial(case.run_copies, layer)
    x = np.random.default_rng(0).normal(size=(LENGTH, FEATURES)) * 0.3
    best = jacobians.ascend(run, x, norm, steps=25)
    assert jacobians.norms(jacobians.jacobian(run, x))[norm] <= best <= bound * SLACK


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_averaging_attention_attains_the_bound_of_its_values(norm):
    # Without queries and keys all weights are equal; at the origin values are steepest.
    layer = kl.ScaledCosineAttention(
        1, 3, temperature=1e-6, epsilon=0.25, use_bias=False, output_shape=3, dtype="float64"
    )
    layer.build((1, LENGTH, FEATURES))
    layer.output_kernel.assign(np.eye(3)[None])
    found = jacobians.norms(jacobians.jacobian(layer, np.zeros((LENGTH, FEATURES))))[norm]
    assert found == pytest.approx(layer.lipschitz(norm=norm).value, rel=1e-4)


def test_queries_alone_attain_their_share():
    # One query at the origin, where it turns fastest; keys and values far away, at opposite poles.
    layer = kl.ScaledCosineAttention(
        1, 1, temperature=2.0, epsilon=1.0, output_shape=1, use_bias=False, dtype="float64"
    )
    layer.build((1, 3, 2))
    layer.query_kernel.assign([[[5.0]], [[0.0]]])
    for kernel in (layer.key_kernel, layer.value_kernel):
        kernel.assign([[[0.0]], [[1e-3]]])
    layer.output_kernel.assign([[[1.0]]])
    x = np.array([[0.0, 0.0], [0.0, 1e6], [0.0, -1e6]])
    pairs = np.array([[False, True, True], [False, True, False], [False, False, True]])
    jac = jacobians.jacobian(lambda x: layer(x, attention_mask=pairs), x)
    # The diagonal stays visible: two of three weights are at the poles.
    assert jacobians.norms(jac)["token"] == pytest.approx(10.0 * 2.0 / 3.0, rel=1e-3)
    assert layer.lipschitz(norm="token", mask=pairs).value == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_is_never_above_theorem_7_2(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        tokens, width, key, value, outputs = (int(n) for n in rng.integers(1, 6, size=5))
        kernels = [
            rng.normal(size=(width, size)) * rng.choice([0.1, 1.0, 5.0])
            for size in (key, key, value)
        ]
        output = rng.normal(size=(value, outputs))
        temperature, epsilon = rng.choice([0.1, 1.0, 8.0]), rng.choice([0.01, 1.0])
        query, keys, values = (operator_norm(kernel) / math.sqrt(epsilon) for kernel in kernels)
        a, g = fold(*(k[None] for k in kernels), temperature=temperature, epsilon=epsilon, xp=np)
        for mask in ("full", "causal", "any"):
            mass = column_mass(2.0 * temperature, tokens, mask)
            for norm, chi in (("l2", mass), ("token", 1.0)):
                bound = certified_cosine_bound(
                    a, g, output[None], norm=norm, temperature=temperature, tokens=tokens, mask=mask
                )
                earlier = temperature * query + math.sqrt(chi) * (values + temperature * keys)
                assert bound.value <= SAFETY**2 * operator_norm(output) * earlier


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_are_ordered(norm):
    layer = Case(kind=kl.ScaledCosineAttention).layer(temperature=0.5)
    full, causal, free = (
        layer.lipschitz(norm=norm, mask=mask).value for mask in ("full", "causal", "any")
    )
    # Searches of scalings end a little apart.
    assert full <= causal * (1.0 + 1e-6) and causal <= free * (1.0 + 1e-6)
    alone = layer.lipschitz(norm=norm, mask=np.eye(LENGTH, dtype=bool)).value
    assert alone <= full * (1.0 + 1e-6)
    lengths = [layer.lipschitz(n, norm=norm).value for n in (1, 2, LENGTH, 50)]
    assert all(b >= a * (1.0 - 1e-6) for a, b in itertools.pairwise(lengths))
    assert lengths[2] == layer.lipschitz(norm=norm).value
    bound = layer.lipschitz(norm=norm)
    assert bound.kind == "certified" and bound.norm == norm and bound.theorem == "Theorem 7.3"
    # Two norms in place of one, one scaling in place of the best: the graph is never below.
    assert float(layer.graph_bound(norm=norm)) >= bound.value * (1.0 - 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_the_bound_scales_as_the_function_does(norm):
    layer = Case(kind=kl.ScaledCosineAttention).layer()
    before = layer.lipschitz(norm=norm).value
    x = Case().inputs()
    value = np.asarray(layer(x))
    t = 3.0
    for weight in (*layer.kernels[:3], layer.query_bias, layer.key_bias, layer.value_bias):
        weight.assign(t * weight)
    layer.epsilon *= t**2
    np.testing.assert_allclose(layer(x), value, rtol=1e-10, atol=1e-12)
    assert layer.lipschitz(norm=norm).value == pytest.approx(before, rel=1e-9)
    layer.output_kernel.assign(-2.0 * layer.output_kernel)
    assert layer.lipschitz(norm=norm).value == pytest.approx(2.0 * before, rel=1e-9)


def test_a_window_needs_no_length():
    layer = kl.ScaledCosineAttention(2, 3, sliding_window=3)
    layer.build((None, None, FEATURES))
    assert np.isfinite(layer.lipschitz().value)
    assert layer.lipschitz(mask="causal").value <= layer.lipschitz().value
    assert layer.lipschitz().value == pytest.approx(layer.lipschitz(100_000).value)
    free = kl.ScaledCosineAttention(2, 3)
    free.build((None, None, FEATURES))
    assert math.isinf(free.lipschitz(mask="causal").value)
    # Column sums are bounded for every length, and the token norm has none.
    assert np.isfinite(free.lipschitz().value) and np.isfinite(free.lipschitz(norm="token").value)


@pytest.mark.parametrize("call", ["no mask", "everything"])
def test_float32_stays_under_the_bound(call):
    case = Case(call=call, cap="l2", dtype="float32", kind=kl.ScaledCosineAttention)
    layer = case.layer()
    layer.condense()
    bound = layer.lipschitz(mask=case.visible()).value
    rng = np.random.default_rng(0)
    for x in _attacks(layer, (LENGTH, FEATURES), rng):
        jac = jacobians.jacobian(functools.partial(case.run_copies, layer), x.astype("float32"))
        # Gradients in float32.
        assert jacobians.norms(jac)["l2"] <= bound * (1.0 + 1e-4)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("factors", [(1e-200, 1.0), (1e200, 1e-200), (1e-200, 1e-100)])
def test_bound_depends_on_the_products_of_kernels_and_not_on_their_sizes(norm, factors):
    rng = np.random.default_rng(0)
    a, g, c = (rng.normal(size=shape) for shape in ((2, 4, 2), (2, 4, 5), (2, 3, 4)))
    size = np.asarray(factors)[:, None, None]

    def bound(a, g, c):
        return certified_cosine_bound(a, g, c, norm=norm, temperature=1.0, tokens=5).value

    assert bound(a * size, g * size, c / size) == pytest.approx(bound(a, g, c), rel=1e-6)
