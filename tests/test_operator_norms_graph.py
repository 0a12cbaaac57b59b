"""Norms in a graph: Gram iteration bounds any matrix from above, a power step from below."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportArgumentType=false, reportCallIssue=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_lipattn.linalg import operator_norm
from keras_lipattn.linalg.gram import (
    CONVERGED,
    NUM_SQUARINGS,
    converged_upper_bound,
    gram_upper_bound,
)
from keras_lipattn.linalg.power import (
    MatrixProduct,
    ScaledMatrix,
    cold_vector,
    power_step,
    warm_vector,
)
from keras_lipattn.linalg.precision import product_allowance

DTYPES = ("float32", "float64")


@st.composite
def matrices(draw):
    """Matrices of every shape, rank, scale and conditioning, as float64."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, min(rows, columns)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    left, _ = np.linalg.qr(rng.normal(size=(rows, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(columns, rank)))
    kind = draw(st.sampled_from(["equal", "geometric", "cliff", "random"]))
    values = {
        "equal": np.ones(rank),
        "geometric": 0.5 ** np.arange(rank),
        "cliff": np.where(np.arange(rank) == 0, 1.0, 1e-9),
        "random": rng.random(rank),
    }[kind]
    sparse = rng.random((rows, columns)) < draw(st.sampled_from([1.0, 1.0, 0.3]))
    return (left * values) @ right.T * sparse * 10.0 ** draw(st.integers(-20, 20))


SPECIAL = {
    "identity": np.eye(7),
    "tall": np.ones((40, 1)),
    "wide": np.ones((1, 40)),
    "one entry": np.array([[-3.0]]),
    "zero": np.zeros((4, 3)),
    "tiny": np.diag([1e-20, 2e-20, 5e-21]),
    "huge": np.diag([1e20, 2e20, 5e19]),
    "both": np.diag([1e18, 1e-18]),
    "nilpotent": np.eye(6, k=1),
    "signs": np.where(np.add.outer(np.arange(8), np.arange(8)) % 2, 1.0, -1.0),
}


def _bounds(matrix, dtype):
    matrix = np.asarray(matrix, dtype)
    bound = gram_upper_bound(tf.constant(matrix))
    return np.asarray(bound, np.float64), operator_norm(matrix)


def _assert_above_and_tight(matrix, dtype):
    bound, exact = _bounds(matrix, dtype)
    assert bound >= exact
    rows, columns = np.shape(matrix)
    # In exact arithmetic the bound is at most `side**(2**-(NUM_SQUARINGS + 2))` times the norm.
    # Every squaring adds its allowance to a number of at least 1 / side; the square roots halve
    # the earlier ones.
    side = min(rows, columns)
    allowance = product_allowance(side, dtype) + product_allowance(max(rows, columns), dtype)
    slack = side**2.0 ** -(NUM_SQUARINGS + 2) * (1.0 + side * allowance) + 1e-4
    assert bound <= exact * slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECIAL)
def test_gram_bounds_special_matrices(name, dtype):
    _assert_above_and_tight(SPECIAL[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrix=matrices())
def test_gram_is_never_below_the_norm(dtype, matrix):
    _assert_above_and_tight(matrix, dtype)


@pytest.mark.parametrize("shape", [(96, 96), (256, 64), (16, 400)])
def test_gram_is_above_for_larger_float32_matrices_too(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    # Top singular values that tie are where rounding could push the bound below.
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    for candidate in (matrix, u @ v, np.abs(matrix), u[:, :1] @ v[:1]):
        _assert_above_and_tight(candidate, "float32")


@pytest.mark.parametrize("name", SPECIAL)
def test_converged_gram_is_as_good_as_exact(name):
    _assert_converged(SPECIAL[name])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrix=matrices())
def test_converged_gram_is_never_below_the_norm(matrix):
    _assert_converged(matrix)


def _assert_converged(matrix):
    bound, exact = float(converged_upper_bound(tf.constant(matrix))), operator_norm(matrix)
    assert exact <= bound <= exact * (1.0 + CONVERGED + 1e-9)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_converged_gram_takes_batches_in_graphs(jit_compile):
    batch = np.random.default_rng(0).normal(size=(3, 9, 5))
    batch[0] = 0.0
    batch[1] = np.linalg.qr(batch[1])[0]
    found = tf.function(converged_upper_bound, jit_compile=jit_compile)(tf.constant(batch))
    exact = operator_norm(batch)
    assert (exact <= np.asarray(found)).all()
    np.testing.assert_allclose(found, exact, rtol=CONVERGED + 1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_converged_gram_of_a_broken_matrix_is_not_a_number_to_trust(value):
    matrix = np.eye(3)
    matrix[1, 2] = value
    assert not np.isfinite(float(converged_upper_bound(tf.constant(matrix))))


def test_more_squarings_are_tighter():
    matrix = tf.constant(np.random.default_rng(0).normal(size=(30, 30)))
    bounds = [float(gram_upper_bound(matrix, num_squarings=n)) for n in (0, 2, 5, 10, 14)]
    assert bounds[:4] == sorted(bounds[:4], reverse=True)
    assert bounds[-1] == pytest.approx(operator_norm(matrix), rel=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gram_of_a_broken_matrix_is_not_a_number_to_trust(value):
    matrix = np.eye(3)
    matrix[1, 2] = value
    assert not np.isfinite(_bounds(matrix, "float32")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_takes_batches(dtype):
    batch = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    batch[0, 1] = 0.0
    batch[1, 1] *= 1e15
    found, exact = _bounds(batch, dtype)
    assert found.shape == (2, 3)
    assert (found >= exact).all()
    single = [[float(gram_upper_bound(tf.constant(m, dtype))) for m in row] for row in batch]
    np.testing.assert_allclose(found, single, rtol=1e-6)


def test_gram_is_the_same_in_a_compiled_graph():
    compiled = tf.function(gram_upper_bound, jit_compile=True)
    for matrix in (SPECIAL["signs"], SPECIAL["zero"], np.random.default_rng(0).normal(size=(9, 5))):
        matrix = tf.constant(matrix, "float32")
        np.testing.assert_allclose(compiled(matrix), gram_upper_bound(matrix), rtol=1e-5)
        assert compiled(matrix) >= operator_norm(matrix)


def test_the_gradient_of_gram_is_that_of_the_norm():
    matrix = tf.constant(np.random.default_rng(0).normal(size=(6, 4)))
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        bound = gram_upper_bound(matrix)
    u, _, v = np.linalg.svd(matrix)
    # The next singular value counts with the power 2^(NUM_SQUARINGS + 1): not at all.
    assert NUM_SQUARINGS == 10
    np.testing.assert_allclose(tape.gradient(bound, matrix), np.outer(u[:, 0], v[0]), atol=1e-8)
    for special in (SPECIAL["zero"], SPECIAL["identity"]):
        special = tf.constant(special)
        with tf.GradientTape() as tape:
            tape.watch(special)
            bound = gram_upper_bound(special)
        assert np.isfinite(tape.gradient(bound, special)).all()


# Power steps -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(matrix=matrices(), seed=st.integers(0, 1000))
def test_a_power_step_is_never_above_the_norm(dtype, matrix, seed):
    matrix = np.asarray(matrix, dtype)
    vector = np.random.default_rng(seed).normal(size=matrix.shape[1]).astype(dtype)
    sigma, moved = power_step(tf.constant(matrix), tf.constant(vector))
    exact = operator_norm(matrix)
    # A few dozen roundings.
    slack = 1.0 + 50 * np.finfo(dtype).eps
    assert exact / np.sqrt(min(matrix.shape)) <= float(sigma) * slack
    assert float(sigma) <= exact * slack
    assert np.linalg.norm(moved) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_power_steps_converge_at_every_scale(dtype, scale):
    matrix = (np.random.default_rng(0).normal(size=(5, 8, 6)) * scale).astype(dtype)
    vector = tf.constant(cold_vector((5, 6)).astype(dtype))
    for _ in range(200):
        sigma, vector = power_step(tf.constant(matrix), vector)
    np.testing.assert_allclose(sigma, operator_norm(matrix), rtol=1e-5)
    warm = warm_vector(matrix, steps=200)
    np.testing.assert_allclose(np.abs(np.sum(warm * vector, axis=-1)), 1.0, rtol=1e-4)


def test_the_gradient_of_a_converged_step_is_that_of_the_norm():
    matrix = np.random.default_rng(0).normal(size=(6, 4))
    vector = tf.constant(warm_vector(matrix, steps=500))
    matrix = tf.constant(matrix)
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        sigma, moved = power_step(matrix, vector)
    u, _, v = np.linalg.svd(matrix)
    np.testing.assert_allclose(tape.gradient(sigma, matrix), np.outer(u[:, 0], v[0]), atol=1e-8)
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        _, moved = power_step(matrix, vector)
    assert tape.gradient(moved, matrix) is None


@pytest.mark.parametrize("scaled", [("rows",), ("columns",), ("rows", "columns")])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_scaled_step_is_one_of_the_scaled_matrix(scaled, scale):
    rng = np.random.default_rng(0)
    matrix = tf.constant(rng.normal(size=(3, 5, 4)) * scale)
    vector = tf.constant(rng.normal(size=(3, 4)))
    scales = {"rows": tf.constant(rng.random((3, 5))), "columns": tf.constant(rng.random((3, 4)))}
    ones = {name: tf.ones_like(value) for name, value in scales.items()}

    def formed(matrix, scales):
        return scales["rows"][..., :, None] * matrix * scales["columns"][..., None, :]

    chosen = {name: scales[name] for name in scaled}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([matrix, *scales.values()])
        steps = [
            power_step(ScaledMatrix(matrix, **chosen), vector),
            power_step(formed(matrix, {**ones, **chosen}), vector),
        ]
    for one, other in zip(*steps, strict=True):
        # A few dozen roundings.
        np.testing.assert_allclose(one, other, rtol=1e-13)
    for source in (matrix, *chosen.values()):
        one, other = (tape.gradient(sigma, source) for sigma, _ in steps)
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "vector"),
    [
        (np.zeros((3, 2)), [1.0, 0.0]),
        (np.ones((3, 2)), [0.0, 0.0]),
        (np.ones((3, 2)), [np.nan, 1.0]),
        (np.full((3, 2), np.nan), [1.0, 0.0]),
        (np.outer([1.0, 2.0, 3.0], [1.0, 0.0]), [0.0, 1.0]),
    ],
)
def test_a_step_that_leads_nowhere_starts_afresh(matrix, vector):
    sigma, moved = power_step(tf.constant(matrix), tf.constant(vector, "float64"))
    assert np.linalg.norm(moved) == pytest.approx(1.0)
    assert np.isnan(sigma) == np.isnan(matrix).any()
    healthy = tf.constant(np.outer([1.0, 2.0, 3.0], [1.0, 0.5]))
    assert float(power_step(healthy, moved)[0]) == pytest.approx(operator_norm(healthy))


def test_a_lifted_step_keeps_the_gradient_of_its_estimate():
    # The vector sees the smaller singular value only, and stays there.
    matrix = tf.constant(np.diag([1.0, 10.0]))
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        norm, _ = power_step(matrix, tf.constant([1.0, 0.0], tf.float64))
    np.testing.assert_allclose(norm, np.sqrt(101.0 / 2.0))
    np.testing.assert_allclose(tape.gradient(norm, matrix), np.diag([1.0, 0.0]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_step_is_finite_where_the_squares_of_the_floor_are_not(scale):
    matrix = tf.constant(scale * np.diag([2.0, 1.0]), tf.float32)
    norm, _ = power_step(matrix, tf.constant([1.0, 0.1], tf.float32))
    assert scale * 1.9 <= float(norm) <= scale * 2.0 * (1.0 + 1e-6)


def test_the_gradient_at_zero_is_finite():
    matrix = tf.zeros((3, 2))
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        sigma, _ = power_step(matrix, tf.constant([1.0, 0.0]))
    assert np.isfinite(tape.gradient(sigma, matrix)).all()


def test_cold_vectors_are_always_the_same():
    np.testing.assert_array_equal(cold_vector((3, 4)), cold_vector((3, 4)))
    np.testing.assert_allclose(np.linalg.norm(cold_vector((3, 4)), axis=-1), 1.0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e12])
def test_a_product_that_is_not_formed_has_the_norm_and_the_gradient_of_its_matrix(stacked, size):
    rng = np.random.default_rng(3)
    left, right = (tf.Variable(rng.normal(size=shape) * size) for shape in ((3, 6, 2), (3, 2, 5)))
    product = MatrixProduct(left, right, stacked)
    matrix = product.formed(keras.ops).numpy()
    assert matrix.shape == product.shape == ((18, 5) if stacked else (3, 6, 5))
    exact = np.linalg.norm(matrix, 2, axis=(-2, -1))
    vector = tf.constant(cold_vector((*matrix.shape[:-2], 5)))
    first, _ = power_step(product, vector)
    # Never above the norm, and not far below in the first step.
    assert (first.numpy() <= exact * (1.0 + 1e-12)).all()
    assert (first.numpy() >= 0.4 * exact).all()
    for _ in range(200):
        found, vector = power_step(product, vector)
    np.testing.assert_allclose(found, exact, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), 1.0)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(power_step(product, vector)[0])
    ours = tape.gradient(total, [left, right])
    with tf.GradientTape() as tape:
        formed = MatrixProduct(left, right, stacked).formed(keras.ops)
        total = tf.reduce_sum(power_step(formed, vector)[0])
    for one, other in zip(ours, tape.gradient(total, [left, right]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9 * size)
