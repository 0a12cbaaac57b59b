"""The bound near one input: sound inside its ball, sharp at its center, shift invariant."""

import math

import numpy as np
import pytest
from helpers import bounds_cases as cases

from keras_lipattn.bounds import certified_layer_bound, unit_head_bound
from keras_lipattn.bounds.local import local_head_bound, local_layer_bound, nonnegative_norm
from keras_lipattn.linalg import operator_norm

# Rounding of Jacobian norms of a few hundred entries in float64.
ROUNDING = 1e-9
# A cap out of reach, to see the local bound itself.
UNCAPPED = 1e12


def into_ball(center, radius):
    def project(x):
        step = x - center
        return center + step * min(1.0, radius / max(np.linalg.norm(step), 1e-300))

    return project


def with_weights(tokens, rng):
    """Masks, and weights of keys: of any size, of a neighbor, of none beyond it."""
    weights = np.exp(2.0 * rng.normal(size=(tokens, tokens)))
    np.fill_diagonal(weights, 1.0)
    neighbor = np.eye(tokens) + 30.0 * np.eye(tokens, k=-1)
    return {**cases.masks(tokens, rng), "weights": weights, "neighbor": neighbor}


@pytest.mark.parametrize("covariance", ["eigenvalue", "trace"])
@pytest.mark.parametrize(("tokens", "width"), [(3, 1), (6, 2), (9, 4)])
def test_dominates_the_jacobian_in_the_whole_ball(tokens, width, covariance):
    rng = np.random.default_rng(tokens)
    b, c = cases.unit_head(width)
    for mask in with_weights(tokens, rng).values():
        starts = cases.inputs(tokens, width, rng)
        for index in rng.choice(len(starts), size=3, replace=False):
            y = starts[index]
            for radius in (0.0, 0.1, 0.5):
                bound = local_head_bound(y, radius, mask=mask, covariance=covariance, cap=UNCAPPED)
                for _ in range(3):
                    step = rng.normal(size=y.shape) * (rng.random((tokens, 1)) < 0.5)
                    step *= radius / max(np.linalg.norm(step), 1e-300)
                    measured = cases.jacobian_norm(y + step, b, c, mask, "l2")
                    assert measured <= (1 + ROUNDING) * bound


def test_dominates_the_jacobian_under_ascent_inside_the_ball():
    rng = np.random.default_rng(1)
    b, c = cases.unit_head(2)
    for name, mask in with_weights(5, rng).items():
        y = rng.normal(size=(5, 2))
        for radius in (0.1, 0.4):
            bound = local_head_bound(y, radius, mask=mask, cap=UNCAPPED)
            found = cases.ascend(
                y, b, c, mask, "l2", steps=20, rate=radius / 3, project=into_ball(y, radius)
            )
            assert found <= (1 + ROUNDING) * bound, name


def test_is_close_to_the_jacobian_at_the_center():
    rng = np.random.default_rng(2)
    ratios = []
    for tokens, width in ((4, 1), (8, 3), (12, 5)):
        b, c = cases.unit_head(width)
        mask = np.ones((tokens, tokens), bool)
        for y in cases.inputs(tokens, width, rng):
            measured = cases.jacobian_norm(y, b, c, mask, "l2")
            ratios.append(local_head_bound(y, 0.0, cap=UNCAPPED) / measured)
    # Norms of blocks lose their signs, nothing else.
    assert np.median(ratios) <= 1.2 and max(ratios) <= 1.6


def test_grows_with_the_radius_up_to_the_constant_of_all_inputs():
    y = np.random.default_rng(3).normal(size=(7, 2))
    for mask, name in ((None, "full"), (np.tri(7, dtype=bool), "causal")):
        values = [local_head_bound(y, r, mask=mask) for r in (0.0, 0.01, 0.1, 0.5, 3.0, 100.0)]
        assert values == sorted(values)
        assert values[0] < values[-1] == unit_head_bound(7, name).value
    window = cases.masks(7, np.random.default_rng(0))["window"]
    everywhere = unit_head_bound(7, "any", n_keys=2, n_queries=2).value
    assert local_head_bound(y, 100.0, mask=window) == everywhere


def test_the_trace_is_never_tighter_than_the_eigenvalue():
    rng = np.random.default_rng(4)
    for y in cases.inputs(8, 3, rng):
        sharp, cheap = (
            local_head_bound(y, 0.2, covariance=kind, cap=UNCAPPED)
            for kind in ("eigenvalue", "trace")
        )
        assert sharp <= cheap * (1 + 1e-12)


def test_does_not_lose_digits_far_from_the_origin():
    # Coordinates are multiples of 2^-10, so that the shift by 2^27 is exact.
    y = np.round(np.random.default_rng(5).normal(size=(6, 2)) * 1024) / 1024
    near = local_head_bound(y, 0.05, cap=UNCAPPED)
    assert local_head_bound(y + 2.0**27, 0.05, cap=UNCAPPED) == pytest.approx(near, rel=1e-12)


def test_long_inputs_are_evaluated_in_blocks(monkeypatch):
    y = np.random.default_rng(6).normal(size=(20, 3))
    whole = local_head_bound(y, 0.1)
    monkeypatch.setattr("keras_lipattn.bounds.local.BLOCK_ENTRIES", 7 * y.size)
    assert local_head_bound(y, 0.1) == pytest.approx(whole, rel=1e-12)


def test_a_layer_is_bounded_near_its_input():
    rng = np.random.default_rng(7)
    for b, c in cases.layers(rng, count=8):
        tokens = 5
        x = rng.normal(size=(tokens, b.shape[1])) / np.abs(b).max()
        mask = np.ones((tokens, tokens), bool)
        radius = 0.1 * float(np.linalg.norm(x))
        bound = local_layer_bound(x, radius, b, c)
        assert bound.norm == "l2" and "Theorem 6" in bound.theorem
        everywhere = certified_layer_bound(b, c, norm="l2", tokens=tokens).value
        # Two searches of scalings, each within 1 % of its optimum.
        assert bound.value <= 1.01 * everywhere
        found = cases.ascend(
            x, b, c, mask, "l2", steps=10, rate=radius / 3, project=into_ball(x, radius)
        )
        assert found <= (1 + ROUNDING) * bound.value


def test_broken_numbers_are_infinite():
    b, c = np.ones((1, 2, 2)), np.ones((1, 2, 3))
    x = np.zeros((3, 2))
    assert local_head_bound(np.full((3, 2), np.nan), 0.1) == math.inf
    assert local_layer_bound(x * np.nan, 0.1, b, c).reason == "a head has no finite constant"
    assert "NaN" in local_layer_bound(x, 0.1, b * np.nan, c).reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": np.zeros(3)}, r"Received: shape=\(3,\)"),
        ({"radius": -0.1}, "Received: radius=-0.1"),
        ({"radius": math.nan}, "Received: radius=nan"),
        ({"mask": np.ones((2, 3))}, r"Received: shape=\(2, 3\)"),
        ({"mask": np.zeros((3, 3))}, "must attend to itself"),
        ({"covariance": "exact"}, "Received: covariance='exact'"),
    ],
)
def test_refuses_what_has_no_bound(arguments, message):
    arguments = {"y": np.zeros((3, 2)), "radius": 0.1, **arguments}
    with pytest.raises(ValueError, match=message):
        local_head_bound(arguments.pop("y"), arguments.pop("radius"), **arguments)


def test_the_norm_of_a_nonnegative_matrix_is_bounded_at_every_step():
    rng = np.random.default_rng(8)
    for _ in range(20):
        matrix = rng.random((6, 6)) * (rng.random((6, 6)) < 0.4) + np.diag(rng.random(6) + 0.01)
        norm = operator_norm(matrix)
        for steps in (1, 3, 100):
            assert nonnegative_norm(matrix, num_iters=steps) >= norm
        assert nonnegative_norm(matrix, num_iters=2000) <= 1.05 * norm
