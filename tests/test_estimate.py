"""Lower estimates reach the constants of linear maps and never exceed a certified constant."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false

import keras
import numpy as np
import pytest
from helpers.certify_cases import jacobian_norm, snapshot
from keras import layers, ops

import keras_lipattn as kl

NORMS = ("l2", "token", "linf")


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_the_operator_norm_of_a_linear_map(norm):
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(12, 6))

    def linear(x):
        return ops.reshape(ops.matmul(ops.reshape(x, (-1, 12)), matrix), (-1, 2, 3))

    # As many starts as outputs: each row is tried.
    x = rng.normal(size=(3, 4, 3))
    found = kl.estimate_lipschitz(linear, x, norm, steps=60, restarts=6)
    exact = jacobian_norm(matrix.T, norm, (3, 3))
    assert exact * (1.0 - 1e-3) <= found.value <= exact * (1.0 + 1e-9)
    # The pair that is returned gives the value: the map is its own derivative.
    sizes = {
        "l2": np.linalg.norm,
        "token": lambda y: np.linalg.norm(y, axis=-1).max(),
        "linf": lambda y: np.abs(y).max(),
    }
    image = ops.convert_to_numpy(linear(found.direction[None]))[0]
    quotient = sizes[norm](image) / sizes[norm](found.direction)
    np.testing.assert_allclose(found.value, quotient, rtol=1e-12)
    assert found.point.shape == found.direction.shape == (4, 3)


def test_the_search_finds_the_point_of_the_largest_slope():
    # The slope of sin(x) is 1 at 0, and 0.07 at the start.
    x = np.full((1, 1), 1.5)
    assert kl.estimate_lipschitz(ops.sin, x, restarts=1).value >= 1.0 - 1e-3
    # x**2 / 2 is steepest at the boundary of the ball.
    found = kl.estimate_lipschitz(lambda x: x * x / 2.0, x, input_radius=2.0)
    np.testing.assert_allclose(found.value, 2.0, rtol=1e-9)


@pytest.mark.parametrize("mask", ["full", "causal", "given"])
def test_it_stays_below_the_certificate_of_attention(mask):
    rng = np.random.default_rng(5)
    layer = kl.L2MultiHeadAttention(2, 3, dtype="float64")
    x = rng.normal(size=(2, 5, 4))
    layer.build(x.shape)
    visible = np.eye(5, dtype=bool) | (rng.random((5, 5)) < 0.5)
    kwargs = {
        "full": {},
        "causal": {"use_causal_mask": True},
        "given": {"attention_mask": visible},
    }[mask]
    for norm in NORMS:
        found = kl.estimate_lipschitz(layer, x, norm, steps=15, restarts=2, call_kwargs=kwargs)
        certified = layer.lipschitz(norm=norm, mask=visible if mask == "given" else mask).value
        # Rounding in float64 is far below 1e-9. A short search finds a tenth of the bound.
        assert 0.1 * certified < found.value <= certified * (1.0 + 1e-9)


def test_masks_of_the_batch_are_taken():
    layer = kl.L2MultiHeadAttention(1, 2, dtype="float64")
    x = np.random.default_rng(0).normal(size=(3, 4, 2))
    layer.build(x.shape)
    padding = np.zeros((3, 4), bool)
    found = kl.estimate_lipschitz(
        layer, x, steps=3, restarts=2, call_kwargs={"query_mask": padding}
    )
    # Every token is padding, so the output is constant.
    assert found.value == 0.0


def test_the_model_is_unchanged_and_the_result_repeats():
    inputs = keras.Input((4, 3))
    x = layers.Dropout(0.5, seed=1)(inputs)
    x = layers.Dense(3, activity_regularizer="l2")(x)
    x = layers.BatchNormalization()(x)
    model = keras.Model(inputs, kl.L2MultiHeadAttention(1, 2)(x))
    points = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    model(points)
    before = snapshot(model)
    first, second = (kl.estimate_lipschitz(model, points, steps=5, seed=7) for _ in range(2))
    after = snapshot(model)
    for key in ("values", "losses", "nodes", "numpy", "python", "keras", "tensorflow", "built"):
        assert after[key] == before[key], key
    assert first.value == second.value > 0.0
    np.testing.assert_array_equal(first.point, second.point)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": 3}, "`function` must be callable"),
        ({"function": layers.Dense(2)}, "no weights yet"),
        ({"norm": "l1"}, "`norm` must be one of"),
        ({"steps": 0}, "`steps` must be a positive integer"),
        ({"restarts": 1.5}, "`restarts` must be a positive integer"),
        ({"step_size": None}, "`step_size` must be a positive number"),
        ({"input_radius": 0.0}, "`input_radius` must be a positive number"),
        ({"input_radius": 0.5}, "tokens of norm at most `input_radius`"),
        ({"seed": -1}, "`seed` must be an integer"),
        ({"x": np.ones((2, 3), int)}, "must have a floating dtype"),
        ({"x": np.ones(3)}, "must have shape"),
        ({"x": np.full((2, 3), np.nan)}, "`x` must be finite"),
        ({"function": lambda x: (x, x)}, "one floating tensor"),
        ({"function": lambda x: ops.sum(x)}, "one output for each"),
        ({"function": lambda x: ops.log(-x)}, "must be finite at `x`"),
        ({"function": lambda x: ops.sqrt(x - x)}, "derivative of `function` must be finite"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_received(change, message):
    arguments = {"function": ops.tanh, "x": np.ones((2, 3)), "steps": 2, "restarts": 1, **change}
    with pytest.raises(ValueError, match=message) as error:
        kl.estimate_lipschitz(**arguments)
    assert "Received: " in str(error.value)
