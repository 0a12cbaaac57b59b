"""From kernels to the bound of a layer: sound under attack, one formula in every precision."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import bounds_cases as cases

from keras_lipattn.bounds import (
    LipschitzBound,
    bound_linf,
    certified_layer_bound,
    frobenius_scaling,
    layer_matrices,
    mask_degrees,
    phi_inv,
    published_layer_bound,
    running_layer_bound,
    s_star,
    split_bound,
    unit_head_bound,
)
from keras_lipattn.bounds.multihead import exact_norms, norm_2_to_1
from keras_lipattn.linalg import SAFETY, operator_norm
from keras_lipattn.linalg.power import ScaledMatrix

NORMS = ("l2", "token", "linf")
# Rounding of Jacobian norms of a few hundred entries in float64.
ROUNDING = 1e-9
bounded = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def graph_formula(b, c, norm, unit, norm_of=operator_norm, xp=np):
    """The formula of a graph, given a function for operator norms."""
    matrices = layer_matrices(b, c, norm, xp)
    norms = {
        name: norm_of(matrix.formed(xp) if isinstance(matrix, ScaledMatrix) else matrix)
        for name, matrix in matrices.items()
    }
    return running_layer_bound(b, c, norm=norm, unit=unit, norms=norms, xp=xp)


def split(norm, b, c, scale):
    return split_bound(norm, scale, exact_norms(layer_matrices(b, c, norm, np, scale)), np)


def svd(matrix):
    return tf.linalg.svd(matrix, compute_uv=False)[..., 0]


def kernels(rng, *, heads=3, inner=6, key=2, value=3, outer=4):
    return (
        rng.normal(size=(heads, inner, key)),
        rng.normal(size=(heads, inner, value)),
        rng.normal(size=(heads, value, outer)),
    )


def certified(b, c, norm, name, mask):
    n_keys, n_queries = mask_degrees(mask)
    return certified_layer_bound(
        b,
        c,
        norm=norm,
        tokens=len(mask),
        mask=cases.mask_class(name),
        n_keys=n_keys,
        n_queries=n_queries,
    ).value


@bounded
@hypothesis.given(
    heads=st.integers(1, 4),
    inner=st.integers(1, 6),
    key=st.integers(1, 4),
    value=st.integers(1, 4),
    outer=st.integers(1, 5),
    tokens=st.integers(1, 6),
    name=st.sampled_from(["full", "causal", "hub", "spokes", "window", "random"]),
    size=st.sampled_from([0.2, 1.0, 4.0]),
    seed=st.integers(0, 2**20),
)
def test_dominates_the_jacobian_for_every_shape(
    heads, inner, key, value, outer, tokens, name, size, seed
):
    rng = np.random.default_rng(seed)
    shape = {"heads": heads, "inner": inner, "key": key, "value": value, "outer": outer}
    b, c = cases.fold(*(size * kernel for kernel in kernels(rng, **shape)))
    mask = cases.masks(tokens, rng)[name]
    x = rng.normal(size=(tokens, inner)) * rng.choice([0.2, 0.7, 2.0]) / size
    jac = cases.jacobian(x, b, c, mask)
    for norm in NORMS:
        measured = cases.attained(jac, norm)[0]
        assert measured <= (1 + ROUNDING) * certified(b, c, norm, name, mask), norm


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_dominates_the_jacobian_under_gradient_ascent(norm, seed):
    rng = np.random.default_rng(seed)
    for b, c in cases.layers(rng, count=3, max_width=4):
        tokens = int(rng.integers(2, 6))
        for name, mask in cases.masks(tokens, rng).items():
            x = rng.normal(size=(tokens, b.shape[1])) / np.abs(b).max()
            rate = 0.2 * np.abs(x).max()
            found = cases.ascend(x, b, c, mask, norm, steps=20, rate=rate)
            assert found <= (1 + ROUNDING) * certified(b, c, norm, name, mask), name


@pytest.mark.parametrize("norm", NORMS)
def test_dominates_the_jacobian_at_the_witnesses_of_every_head(norm):
    rng = np.random.default_rng(4)
    # Each head reads its own coordinates, so that all heads can be at their worst at once.
    heads, key, tokens = 3, 2, 9
    b = np.zeros((heads, heads * key, key))
    for h in range(heads):
        b[h, h * key : (h + 1) * key] = np.eye(key)
    for c in (np.stack([np.eye(key)] * heads), rng.normal(size=(heads, key, 3))):
        for y in cases.witnesses(tokens, key):
            x = np.tile(y, heads)
            for name, mask in cases.masks(tokens, rng).items():
                measured = cases.jacobian_norm(x, b, c, mask, norm)
                assert measured <= (1 + ROUNDING) * certified(b, c, norm, name, mask), name


def test_the_norm_of_concatenated_queries_would_be_too_small_for_the_token_norm():
    # Two heads read one coordinate each; every token is near the center for one head only.
    tokens, far = 1025, 60.0
    reach = math.sqrt(s_star(512) + 1.5)
    x = np.zeros((tokens, 2))
    groups = [(reach, far), (-reach, far), (far, reach), (far, -reach)]
    x[1:] = np.repeat(groups, 256, axis=0)
    b, c = np.eye(2)[:, :, None], np.eye(2)[:, None, :]
    covector = np.zeros((tokens, 2))
    covector[0] = math.sqrt(0.5)
    row = cases.pull_back(x, b, c, np.ones((tokens, tokens), bool), covector)
    measured = np.linalg.norm(row, axis=1).sum()
    assert measured == pytest.approx(17.845, abs=1e-3)
    constant = unit_head_bound(tokens, norm="token").value
    concatenated = b.transpose(1, 0, 2).reshape(2, 2)
    assert measured > constant * operator_norm(concatenated) * operator_norm(c.reshape(2, 2))
    assert measured <= certified_layer_bound(b, c, norm="token", tokens=tokens).value


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [1e-6, 0.5, 3.0, 1e5])
def test_scales_as_the_function_does(norm, factor):
    query, value, output = kernels(np.random.default_rng(9))

    def bound(q=1.0, v=1.0, o=1.0):
        return certified_layer_bound(
            *cases.fold(q * query, v * value, o * output), norm=norm, tokens=7
        ).value

    # The search sees the same problem up to rounding, hence nearly the same scaling.
    assert bound(q=factor) == pytest.approx(factor**2 * bound(), rel=1e-6)
    assert bound(v=factor) == pytest.approx(factor * bound(), rel=1e-6)
    assert bound(o=-factor) == pytest.approx(factor * bound(), rel=1e-6)


def test_the_jacobian_grows_with_the_square_of_the_query_kernel():
    # Hence the exponent 4 of its norm in the published bound: exponent 2 would be violated.
    x = np.zeros((11, 1))
    x[1::2], x[2::2] = 1.4, -1.4
    t = 10.0
    one = np.ones((1, 1, 1))
    b, c = cases.fold(t * one, one, one)
    measured = cases.jacobian_norm(x / t, b, c, np.ones((11, 11), bool), "l2")
    assert measured == pytest.approx(280.3, abs=0.1)
    published = published_layer_bound(t * one, one, one, norm="l2", tokens=11)
    assert published == pytest.approx(1866.4, abs=0.1)
    assert measured > published / t


@pytest.mark.parametrize("norm", NORMS)
def test_exact_norms_in_the_graph_formula_never_go_below_the_certificate(norm):
    rng = np.random.default_rng(10)
    for b, c in cases.layers(rng, count=30):
        unit = unit_head_bound(12, norm=norm)
        single = graph_formula(b, c, norm, unit)
        value = certified_layer_bound(b, c, norm=norm, tokens=12).value
        assert value <= SAFETY * (1 + 1e-12) * single
        # One scaling is a good one: it loses little.
        assert single <= 1.5 * value


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_every_scaling_gives_a_valid_bound(norm):
    rng = np.random.default_rng(11)
    mask = np.ones((5, 5), bool)
    constant = unit_head_bound(5, norm=norm).value
    for b, c in cases.layers(rng, count=10):
        x = rng.normal(size=(5, b.shape[1])) / np.abs(b).max()
        measured = cases.jacobian_norm(x, b, c, mask, norm)
        for _ in range(5):
            scale = np.exp(rng.normal(size=len(b)) * 2.0)
            assert measured <= (1 + ROUNDING) * constant * split(norm, b, c, scale)


def test_the_search_of_scalings_finds_the_best_of_many():
    rng = np.random.default_rng(12)
    for norm in ("l2", "token"):
        constant = unit_head_bound(6, norm=norm).value
        for b, c in cases.layers(rng, count=10):
            found = certified_layer_bound(b, c, norm=norm, tokens=6).value / constant
            logs = np.log(frobenius_scaling(b, c, np)) + rng.normal(size=(200, len(b)))
            best = min(split(norm, b, c, scale) for scale in np.exp(logs))
            # The descent stops within 1 % of the minimum of a convex function.
            assert found <= 1.01 * best


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_published_bound_is_never_below(norm):
    rng = np.random.default_rng(13)
    for tokens in (1, 2, 10, 200):
        for _ in range(10):
            shape = rng.integers(1, 6, size=5)
            query, value, output = kernels(
                rng, **dict(zip(["heads", "inner", "key", "value", "outer"], shape, strict=True))
            )
            published = published_layer_bound(query, value, output, norm=norm, tokens=tokens)
            b, c = cases.fold(query, value, output)
            for mask in ("full", "causal", "any"):
                bound = certified_layer_bound(b, c, norm=norm, tokens=tokens, mask=mask)
                # Both carry their own allowances for rounding.
                assert bound.value <= (1 + 1e-8) * published


def test_there_is_no_published_bound_for_tokens_or_broken_kernels():
    query, value, output = kernels(np.random.default_rng(0))
    assert published_layer_bound(query, value, output, norm="token", tokens=4) == math.inf
    value[0, 0, 0] = np.nan
    assert published_layer_bound(query, value, output, norm="l2", tokens=4) == math.inf


@pytest.mark.parametrize("norm", NORMS)
def test_does_not_depend_on_the_order_of_heads(norm):
    b, c = cases.fold(*kernels(np.random.default_rng(14), heads=4))
    order = [2, 0, 3, 1]
    bound = certified_layer_bound(b, c, norm=norm, tokens=5).value
    # The search starts from other random vectors, hence 1 %.
    permuted = certified_layer_bound(b[order], c[order], norm=norm, tokens=5).value
    assert permuted == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("norm", NORMS)
def test_heads_without_output_cost_nothing(norm):
    b, c = cases.fold(*kernels(np.random.default_rng(15), heads=2))
    bound = certified_layer_bound(b, c, norm=norm, tokens=5).value
    with_zeros = certified_layer_bound(
        np.concatenate([b, 0 * b]), np.concatenate([c, 0 * c]), norm=norm, tokens=5
    ).value
    assert with_zeros == pytest.approx(bound, rel=1e-2)
    assert certified_layer_bound(b, 0 * c, norm=norm, tokens=5).value == 0.0


@pytest.mark.parametrize("norm", NORMS)
def test_keras_ops_and_numpy_agree_in_float32_and_gradients_are_finite(norm):
    rng = np.random.default_rng(16)
    b, c = (kernel.astype(np.float32) for kernel in cases.fold(*kernels(rng)))
    # Zero heads on either side are where square roots and quotients go wrong.
    b[0], c[1] = 0.0, 0.0
    unit = unit_head_bound(20, norm=norm)
    expected = graph_formula(b, c, norm, unit)
    variables = tf.Variable(b), tf.Variable(c)

    with tf.GradientTape() as tape:
        value = graph_formula(*variables, norm, unit, svd, keras.ops)
    # Ten operations in float32.
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for gradient in tape.gradient(value, variables):
        assert np.isfinite(np.asarray(gradient)).all()
    with tf.GradientTape() as tape:
        scale = frobenius_scaling(*variables, keras.ops)
    for gradient in tape.gradient(scale, variables):
        assert np.isfinite(np.asarray(gradient)).all()
    assert np.isfinite(scale).all() and np.min(scale) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_the_formula(norm):
    rng = np.random.default_rng(17)
    kernels_ = cases.fold(*kernels(rng))
    unit = unit_head_bound(20, norm=norm)

    def value(b, c):
        return graph_formula(b, c, norm, unit)

    variables = [tf.Variable(kernel) for kernel in kernels_]
    with tf.GradientTape() as tape:
        result = graph_formula(variables[0], variables[1], norm, unit, svd, keras.ops)
    gradients = tape.gradient(result, variables)
    directions = [rng.normal(size=kernel.shape) for kernel in kernels_]
    slope = sum(float(np.sum(g * d)) for g, d in zip(gradients, directions, strict=True))
    h = 1e-6
    ahead, behind = (
        value(*(k + sign * h * d for k, d in zip(kernels_, directions, strict=True)))
        for sign in (1, -1)
    )
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-5)


def test_a_graph_gets_no_infinite_constant():
    b, c = cases.fold(*kernels(np.random.default_rng(18)))
    with pytest.raises(ValueError, match="number of tokens is not known"):
        graph_formula(b, c, "l2", unit_head_bound(None))


def test_sums_of_entries_dominate_every_direction():
    rng = np.random.default_rng(19)
    for b, _ in cases.layers(rng, count=30):
        bounds = norm_2_to_1(b, operator_norm(b), np)
        signs = np.array(list(itertools.product([-1, 1], repeat=b.shape[1])))
        for head, bound in zip(b, bounds, strict=True):
            assert np.linalg.norm(signs @ head, axis=1).max() <= (1 + ROUNDING) * bound


def test_max_norm_takes_the_smaller_of_its_two_bounds():
    rng = np.random.default_rng(20)
    for b, c in cases.layers(rng, count=20):
        row, score = 1.0 + 4.0 * s_star(9), 4.0 * phi_inv(9)
        norms = {"head_query": operator_norm(b)}
        both = bound_linf(b, c, row, score, norms, np)
        assert both <= bound_linf(b, c, row, math.inf, norms, np)
        assert both <= bound_linf(b, c, math.inf, score, norms, np)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("entry", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["b", "c"])
def test_broken_kernels_are_infinite_with_a_reason(norm, entry, where):
    b, c = cases.fold(*kernels(np.random.default_rng(21)))
    (b if where == "b" else c)[1, 0, 1] = entry
    bound = certified_layer_bound(b, c, norm=norm, tokens=4)
    assert bound.value == math.inf and "NaN" in bound.reason


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("error")
def test_extreme_kernels_neither_overflow_nor_vanish(norm):
    b, c = cases.fold(*kernels(np.random.default_rng(22)))
    bound = certified_layer_bound(b, c, norm=norm, tokens=4).value
    for small, large in ((1e-200, 1e200), (1e-300, 1e300)):
        for q, o in ((small, large), (large, small)):
            value = certified_layer_bound(q * b, o * c, norm=norm, tokens=4).value
            assert value == pytest.approx(bound, rel=1e-6)
    huge = certified_layer_bound(1e300 * b, 1e300 * c, norm=norm, tokens=4)
    assert huge.value == math.inf and "float64" in huge.reason
    assert 0.0 < certified_layer_bound(1e-300 * b, 1e-300 * c, norm=norm, tokens=4).value < 1e-290


@pytest.mark.parametrize("norm", NORMS)
def test_the_rounding_of_a_canceling_product_is_covered(norm):
    # W_V is orthogonal to B up to rounding: the float32 product is all error.
    rng = np.random.default_rng(23)
    query = rng.normal(size=(1, 40, 1))
    value = rng.normal(size=(1, 40, 1))
    value -= query * np.sum(query * value) / np.sum(query**2)
    output = np.ones((1, 1, 1))
    b, c = cases.fold(query, value, output)
    exactly = math.fsum(float(q) * float(v) for q, v in zip(b.ravel(), value.ravel(), strict=True))
    scale = operator_norm(b[0]) * operator_norm(value[0]) * operator_norm(output[0])
    bound = certified_layer_bound(b, c, norm=norm, tokens=1, product_scale=scale).value
    smallest = certified_layer_bound(b, np.full_like(c, exactly), norm=norm, tokens=1).value
    assert bound >= smallest
    ordinary = cases.fold(*kernels(rng))
    without = certified_layer_bound(*ordinary, norm=norm, tokens=5).value
    with_allowance = certified_layer_bound(
        *ordinary, norm=norm, tokens=5, product_scale=np.full(3, 20.0)
    ).value
    assert without <= with_allowance <= without * (1 + 1e-11)


@pytest.mark.parametrize("norm", NORMS)
def test_errors_of_the_kernels_are_covered(norm):
    rng = np.random.default_rng(25)
    for _ in range(5):
        # One head: there is no scaling to search for, and values can be compared.
        b, c = rng.normal(size=(1, 5, 2)), rng.normal(size=(1, 2, 3))
        covered = certified_layer_bound(
            b, c, norm=norm, tokens=4, query_error=0.03, product_error=[0.02]
        ).value
        for _ in range(20):
            # At random, and along the worst direction of each.
            moves = [rng.normal(size=m.shape) for m in (b, c)]
            for matrix, move in zip((b, c), moves, strict=True):
                left, _, right = np.linalg.svd(matrix[0], full_matrices=False)
                move += rng.choice([0.0, 100.0]) * np.outer(left[:, 0], right[0])
            moved = [
                matrix + size * move / np.linalg.norm(move)
                for matrix, move, size in zip((b, c), moves, (0.03, 0.02), strict=True)
            ]
            assert certified_layer_bound(*moved, norm=norm, tokens=4).value <= covered
        exact = certified_layer_bound(b, c, norm=norm, tokens=4).value
        close = certified_layer_bound(
            b, c, norm=norm, tokens=4, query_error=1e-7, product_error=1e-7
        ).value
        assert exact < close < exact * (1 + 1e-5)


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_constants_of_heads_replace_the_unit_constant(norm):
    b, c = cases.fold(*kernels(np.random.default_rng(24)))
    unit = unit_head_bound(9, norm=norm).value
    usual = certified_layer_bound(b, c, norm=norm, tokens=9).value
    constants = np.full(3, unit)

    def bound(constants):
        return certified_layer_bound(
            b, c, norm=norm, tokens=9, head_constants=constants, head_theorem="Theorem 6"
        )

    assert bound(constants).value == pytest.approx(usual, rel=1e-6)
    assert "Theorem 6" in bound(constants).theorem
    assert bound(constants * [1.0, 0.5, 1.0]).value < usual
    assert bound(constants * [1.0, np.inf, 1.0]).reason == "a head has no finite constant"
    with pytest.raises(ValueError, match="Received: head_scores=None"):
        certified_layer_bound(b, c, norm="linf", tokens=9, head_constants=constants)


def test_kernels_changed_in_place_are_not_mistaken_for_the_old_ones():
    b, c = cases.fold(*kernels(np.random.default_rng(25)))
    before = certified_layer_bound(b, c, norm="l2", tokens=4).value
    c *= 2.0
    assert certified_layer_bound(b, c, norm="l2", tokens=4).value == pytest.approx(2.0 * before)
    c[2, 1, 3] += 1e-3
    assert certified_layer_bound(b, c, norm="l2", tokens=4).value != 2.0 * before


def test_low_precision_kernels_are_taken_as_the_numbers_they_hold():
    b, c = (k.astype(np.float32) for k in cases.fold(*kernels(np.random.default_rng(26))))
    for norm in NORMS:
        low = certified_layer_bound(b, c, norm=norm, tokens=4)
        high = certified_layer_bound(b.astype(float), c.astype(float), norm=norm, tokens=4)
        assert low == high


@pytest.mark.parametrize(
    ("b_shape", "c_shape"),
    [((2, 3), (2, 3, 4)), ((2, 5, 3), (1, 3, 4)), ((2, 5, 3), (2, 4, 4)), ((0, 5, 3), (0, 3, 4))],
)
def test_shapes_that_do_not_fit_are_refused(b_shape, c_shape):
    with pytest.raises(ValueError, match=r"Received: b\.shape="):
        certified_layer_bound(np.ones(b_shape), np.ones(c_shape), norm="l2", tokens=3)


def test_the_result_names_its_theorems():
    b, c = cases.fold(*kernels(np.random.default_rng(27)))
    bound = certified_layer_bound(b, c, norm="l2", tokens=50, mask="causal", published=1e6)
    assert bound.kind == "certified" and bound.published == 1e6
    assert bound.theorem == "Theorem 5.1 with Theorem 3.C"
    assert certified_layer_bound(b, c, norm="token", tokens=5).theorem.startswith("Theorem 5.2")
    assert certified_layer_bound(b, c, norm="linf", tokens=5).theorem == "Theorem 5.3"
    assert "published bound 1e+06" in str(bound)


def test_a_bound_is_a_value_that_says_what_it_is():
    bound = LipschitzBound(value=np.float64(2.5), norm="token", kind="lower", theorem="")
    assert float(bound) == 2.5 and type(bound.value) is float
    assert str(bound) == "2.5 (lower, largest Euclidean norm of a token)"
    unknown = LipschitzBound(
        value=math.inf, norm="l2", kind="certified", theorem="", reason="no rule for this layer"
    )
    assert str(unknown).endswith(": no rule for this layer") and not unknown.is_finite
    assert bound == LipschitzBound(value=2.5, norm="token", kind="lower", theorem="")
    assert len({bound, unknown, bound}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"value": math.nan},
        {"value": -1.0},
        {"value": math.inf},
        {"norm": "l1"},
        {"kind": "exact"},
        {"published": math.nan},
    ],
)
def test_a_bound_refuses_what_says_nothing(change):
    arguments = {"value": 1.0, "norm": "l2", "kind": "certified", "theorem": ""}
    with pytest.raises(ValueError, match="Received: "):
        LipschitzBound(**{**arguments, **change})


# The products of the heads stay, their kernels move apart by hundreds of orders of magnitude.
APART = [(1e-200, 1.0, 1e200), (1e200, 1e-200, 1e-200), (1.0, 1e-150, 1e150), (1e-200, 1e-200, 1.0)]


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("factors", APART)
@pytest.mark.parametrize("errors", [False, True])
def test_bound_depends_on_the_products_of_kernels_and_not_on_their_sizes(norm, factors, errors):
    rng = np.random.default_rng(0)
    b, c = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 2, 5))
    size = np.asarray(factors)
    wide = size[:, None, None]

    def bound(b, c, query, product):
        options = dict(query_error=query, product_error=product) if errors else {}
        return certified_layer_bound(b, c, norm=norm, tokens=6, **options).value

    error = np.full(3, 1e-3)
    expected = bound(b, c, error, error)
    assert bound(b * wide, c / wide, error * size, error / size) == pytest.approx(
        expected, rel=1e-6
    )
