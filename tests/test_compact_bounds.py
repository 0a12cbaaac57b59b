"""Attention on bounded tokens: dot products in a ball, under attack."""

import math

import numpy as np
import pytest
from helpers import bounds_cases as cases

from keras_lipattn.bounds.column_sums import column_mass
from keras_lipattn.bounds.compact import (
    combine_heads,
    dot_product_constants,
    dot_product_layer_constant,
)
from keras_lipattn.linalg import SAFETY, operator_norm

# Central differences with step 1e-6 of functions of size 1.
DIFFERENCES = 1e-6


def softmax(logits, mask):
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def dot_product_head(query_kernel, key_kernel, query_bias, key_bias, mask):
    def head(x):
        logits = (x @ query_kernel + query_bias) @ (x @ key_kernel + key_bias).T
        return softmax(logits / math.sqrt(len(query_bias)), mask) @ x

    return head


def jacobian(function, x):
    h = 1e-6
    columns = [
        (function(x + h * e.reshape(x.shape)) - function(x - h * e.reshape(x.shape))) / (2 * h)
        for e in np.eye(x.size)
    ]
    return np.stack(columns, axis=-1).reshape(*columns[0].shape, *x.shape)


def measured_norms(function, x):
    jac = jacobian(function, x)
    return cases.attained(jac, "l2")[0], cases.attained(jac, "token")[0]


def tokens_in_ball(rng, tokens, width, radius, center):
    """Tokens inside, on the sphere, or at its two poles along one direction."""
    x = rng.normal(size=(tokens, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kind = rng.integers(3)
    if kind == 1:
        x *= rng.random((tokens, 1))
    if kind == 2:
        x = rng.choice([-1.0, 1.0], size=(tokens, 1)) * x[:1]
    return center + radius * x


def masks(tokens, rng):
    """Masks of every class; `"any"` need not keep the diagonal here."""
    free = rng.random((tokens, tokens)) < 0.5
    free[np.arange(tokens), rng.integers(tokens, size=tokens)] = True
    return {
        "full": np.ones((tokens, tokens), bool),
        "causal": np.tri(tokens, dtype=bool),
        "any": free,
    }


@pytest.mark.parametrize("seed", range(4))
def test_dot_product_attention_stays_below_theorem_7_1(seed):
    rng = np.random.default_rng(seed)
    for _ in range(12):
        tokens, width, key = rng.integers([2, 1, 1], [7, 4, 4])
        query_kernel, key_kernel = rng.normal(size=(2, width, key)) * rng.choice([0.3, 1.0, 3.0])
        query_bias, key_bias = rng.normal(size=(2, key))
        center = rng.normal(size=width) * rng.choice([0.0, 1.0])
        radius = rng.choice([0.3, 1.0, 2.0])
        x = tokens_in_ball(rng, tokens, width, radius, center)
        for name, mask in masks(tokens, rng).items():
            bound = dot_product_constants(
                query_kernel,
                key_kernel,
                radius=radius,
                tokens=int(tokens),
                mask=name,
                center=center,
                query_bias=query_bias,
            )
            head = dot_product_head(query_kernel, key_kernel, query_bias, key_bias, mask)
            l2, token = measured_norms(head, x)
            assert l2 <= bound.l2 * (1 + DIFFERENCES) + DIFFERENCES
            assert token <= bound.token * (1 + DIFFERENCES) + DIFFERENCES


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 50.0, 1000.0])
@pytest.mark.parametrize("mask", ["full", "causal", "any"])
def test_column_mass_dominates_columns_and_grows(spread, mask):
    rng = np.random.default_rng(0)
    previous = 0.0
    for tokens in (1, 2, 5, 12):
        mass = column_mass(spread, tokens, mask)
        assert mass >= previous
        previous = mass
        visible = masks(tokens, rng)[mask]
        for _ in range(20):
            logits = rng.choice([0.0, spread], size=(tokens, tokens))
            assert softmax(logits, visible).sum(axis=0).max() <= mass * (1 + 1e-12)


def test_column_mass_without_a_length():
    assert column_mass(2.0, None, "full") == pytest.approx(math.exp(2.0))
    assert column_mass(2.0, None, "full") >= column_mass(2.0, 10**9, "full")
    assert column_mass(1e4, None, "full") == math.inf
    assert column_mass(2.0, None, "causal") == math.inf
    assert column_mass(2.0, None, "any") == math.inf
    assert column_mass(2.0, None, "any", n_queries=5) == 5.0
    assert column_mass(2.0, 3, "any", n_queries=5) == 3.0
    with pytest.raises(ValueError, match="Received: mask='hub'"):
        column_mass(2.0, 3, "hub")


def test_is_below_the_bound_of_castin_ablin_and_peyre():
    rng = np.random.default_rng(1)
    for tokens in (1, 2, 10, 1000):
        for _ in range(10):
            query, key = rng.normal(size=(2, 4, 3)) * rng.choice([0.1, 1.0, 5.0])
            radius = rng.uniform(0.1, 3.0)
            gain = operator_norm(query @ key.T) / math.sqrt(3) * radius**2
            earlier = math.sqrt(3.0 * (gain**2 * (4 * tokens + 1) + tokens))
            for mask in ("full", "causal", "any"):
                bound = dot_product_constants(query, key, radius=radius, tokens=tokens, mask=mask)
                assert bound.l2 <= earlier


def test_heads_of_a_batch_are_the_heads_one_by_one():
    rng = np.random.default_rng(2)
    query, key = rng.normal(size=(2, 3, 5, 2))
    bias, center = rng.normal(size=(3, 2)), rng.normal(size=5)
    together = dot_product_constants(
        query, key, radius=1.0, tokens=6, query_bias=bias, center=center
    )
    for h in range(3):
        alone = dot_product_constants(
            query[h], key[h], radius=1.0, tokens=6, query_bias=bias[h], center=center
        )
        assert together.l2[h] == pytest.approx(alone.l2, rel=1e-12)
        assert together.token[h] == pytest.approx(alone.token, rel=1e-12)
        assert type(alone.l2) is float


@pytest.mark.filterwarnings("error")
def test_broken_numbers_are_infinite():
    query = np.ones((2, 3, 2))
    broken = query.copy()
    broken[0, 0, 0] = np.nan
    bound = dot_product_constants(broken, query, radius=1.0, tokens=4)
    assert np.isinf(bound.l2).all() and np.isinf(bound.token).all()
    assert dot_product_constants(query[0], query[0], radius=math.inf, tokens=4).l2 == math.inf
    assert combine_heads(broken, np.ones(2)) == math.inf
    assert combine_heads(query, [1.0, math.inf]) == math.inf


def test_kernels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"Received: query_kernel\.shape=\(3, 2\)"):
        dot_product_constants(np.ones((3, 2)), np.ones((3, 4)), radius=1.0, tokens=2)


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_combined_heads_dominate_sums_of_linear_heads(norm):
    # Heads that are linear maps of each token: both norms are operator norms.
    rng = np.random.default_rng(3)
    for _ in range(30):
        heads, width, inner, outer = rng.integers(1, 5, size=4)
        maps = rng.normal(size=(heads, width, inner)) * rng.choice([0.1, 1.0], size=(heads, 1, 1))
        kernels = rng.normal(size=(heads, inner, outer))
        total = operator_norm(np.einsum("hij,hjk->ik", maps, kernels))
        constants = operator_norm(maps)
        combined = combine_heads(kernels, constants)
        assert total <= SAFETY * combined
        assert combined <= SAFETY**2 * np.sum(operator_norm(kernels) * constants)


def test_heads_that_are_zero_cost_nothing():
    rng = np.random.default_rng(4)
    kernels = rng.normal(size=(3, 2, 4))
    kernels[1] = 0.0
    alone = combine_heads(kernels[[0, 2]], [1.0, 2.0])
    assert combine_heads(kernels, [1.0, 5.0, 2.0]) == pytest.approx(alone)
    assert combine_heads(kernels, [0.0, 5.0, 0.0]) == 0.0


def attention_layer(query, key, value, output, query_bias, key_bias, mask):
    heads = [
        dot_product_head(*parts, mask)
        for parts in zip(query, key, query_bias, key_bias, strict=True)
    ]

    def layer(x):
        return sum(head(x) @ v @ o for head, v, o in zip(heads, value, output, strict=True))

    return layer


def tokens_in_ellipsoid(rng, tokens, axes, center):
    """Tokens inside and on the surface, some of them opposite to others."""
    return tokens_in_ball(rng, tokens, len(axes), 1.0, 0.0) @ axes + center


def _climb(function, tokens, axes, center, rng, steps=40):
    """The largest norms that random steps in the ellipsoid lead to."""
    v = tokens_in_ball(rng, tokens, len(axes), 1.0, 0.0)
    best = np.array(measured_norms(function, v @ axes + center))
    for _ in range(steps):
        moved = v + 0.3 * rng.normal(size=v.shape)
        moved /= np.maximum(1.0, np.linalg.norm(moved, axis=1, keepdims=True))
        found = np.array(measured_norms(function, moved @ axes + center))
        if found[0] > best[0]:
            v = moved
        best = np.maximum(best, found)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_layers_on_ellipsoids_stay_below_theorem_7_4(seed):
    rng = np.random.default_rng(seed)
    for trial in range(6):
        heads, tokens, width, key, value, inner, outer = rng.integers(
            [1, 2, 2, 1, 1, 1, 1], [4, 6, 4, 4, 4, 4, 4]
        )
        size = rng.choice([0.3, 1.0, 2.0])
        query_kernel, key_kernel = size * rng.normal(size=(2, heads, width, key))
        value_kernel, output = (
            rng.normal(size=(heads, width, value)),
            rng.normal(size=(heads, value, outer)),
        )
        query_bias, key_bias = rng.normal(size=(2, heads, key)) * rng.choice([0.0, 1.0])
        axes = rng.normal(size=(inner, width)) * rng.choice([0.1, 1.0], size=width)
        center = rng.normal(size=width) * rng.choice([0.0, 1.0])
        for name, mask in masks(tokens, rng).items():
            layer = attention_layer(
                query_kernel, key_kernel, value_kernel, output, query_bias, key_bias, mask
            )
            found = (
                _climb(layer, tokens, axes, center, rng)
                if trial == 0
                else measured_norms(layer, tokens_in_ellipsoid(rng, tokens, axes, center))
            )
            for norm, value_found in zip(("l2", "token"), found, strict=True):
                bound = dot_product_layer_constant(
                    query_kernel,
                    key_kernel,
                    value_kernel,
                    output,
                    norm=norm,
                    axes=axes,
                    tokens=int(tokens),
                    mask=name,
                    center=center,
                    query_bias=query_bias,
                )
                assert value_found <= bound * (1 + DIFFERENCES) + DIFFERENCES


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_one_head_on_a_ball_is_theorem_7_1(norm):
    rng = np.random.default_rng(5)
    query, key = rng.normal(size=(2, 1, 4, 3))
    for center in (np.zeros(4), rng.normal(size=4)):
        alone = dot_product_constants(
            query[0], key[0], radius=1.5, tokens=6, center=center, scale=0.5
        )
        eyes = np.eye(4)[None]
        together = dot_product_layer_constant(
            query,
            key,
            eyes,
            eyes,
            norm=norm,
            axes=1.5 * np.eye(4),
            tokens=6,
            center=center,
            scale=0.5,
        )
        # Equal around the origin; elsewhere the two parts of the slope need not be aligned.
        assert together <= getattr(alone, norm) * (1 + 1e-8)
        if not center.any():
            assert together == pytest.approx(getattr(alone, norm), rel=1e-8)


def test_flat_ellipsoids_cost_less_than_balls():
    rng = np.random.default_rng(6)
    query, key, value = rng.normal(size=(3, 4, 8, 2))
    output = rng.normal(size=(4, 2, 8))
    scales = np.geomspace(1.0, 0.05, 8)
    for norm in ("l2", "token"):
        ball, flat = (
            dot_product_layer_constant(
                query, key, value, output, norm=norm, axes=np.diag(a), tokens=16
            )
            for a in (np.ones(8), scales)
        )
        assert flat < 0.6 * ball


@pytest.mark.filterwarnings("error")
def test_broken_layers_are_infinite():
    query, output = np.ones((2, 3, 2)), np.ones((2, 2, 3))
    common: dict = {"norm": "l2", "axes": np.eye(3), "tokens": 4}
    for index in range(4):
        parts = [query.copy(), query.copy(), query.copy(), output.copy()]
        parts[index][0, 0, 0] = np.nan
        assert dot_product_layer_constant(*parts, **common) == math.inf
    assert (
        dot_product_layer_constant(
            query, query, query, output, norm="l2", axes=np.inf * np.ones((3, 3)), tokens=4
        )
        == math.inf
    )
    unknown = {**common, "tokens": None}
    assert (
        dot_product_layer_constant(query, query, query, output, mask="any", **unknown) == math.inf
    )
    token = {**unknown, "norm": "token"}
    assert math.isfinite(dot_product_layer_constant(query, query, query, output, **token))
    silent = dot_product_layer_constant(query, query, 0.0 * query, output, **common)
    assert silent == 0.0


@pytest.mark.parametrize("size", [1e-200, 1e-100, 1e100, 1e200])
def test_heads_of_sizes_far_apart_combine_like_heads_of_one_size(size):
    rng = np.random.default_rng(0)
    kernels, constants = rng.normal(size=(3, 4, 5)), np.array([0.5, 1.0, 2.0])
    # Two scalings of three see the products alone; the third one may be better for one size.
    products = np.array([size, 1.0, 1.0 / size])
    moved = combine_heads(kernels * products[:, None, None], constants / products)
    assert 0.999 * combine_heads(kernels, constants) <= moved
    assert moved <= float(np.sum(np.linalg.norm(kernels, 2, axis=(1, 2)) * constants)) * 1.001


def test_constants_too_small_for_a_float_are_not_zero():
    assert combine_heads(np.full((1, 2, 2), 1e-200), [1e-200]) > 0.0


@pytest.mark.parametrize(
    "powers", [(0, 160, 160, -160), (-160, -160, -160, 160), (-100, 160, 100, -160)]
)
@pytest.mark.parametrize("norm", ["l2", "token"])
def test_layer_constant_of_heads_of_other_sizes_dominates_their_value_path(norm, powers):
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=shape) for shape in ((2, 4, 2),) * 3 + ((2, 2, 4),)]
    for part, power in zip(parts, powers, strict=True):
        part[1] *= 10.0**power
    found = dot_product_layer_constant(*parts, norm=norm, axes=np.eye(4), tokens=5)
    # Where all tokens are equal a layer is linear.
    assert found * (1.0 + 1e-9) >= operator_norm(np.sum(parts[2] @ parts[3], axis=0))
