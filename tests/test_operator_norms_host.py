"""The exact operator norm on the host."""

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from keras_lipattn.linalg import SAFETY, fast_operator_norm, operator_norm

matrices = hypothesis_numpy.arrays(
    np.float64,
    hypothesis_numpy.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-10, 10),
)
bounded = hypothesis.settings(max_examples=50, deadline=None, derandomize=True)


@bounded
@hypothesis.given(matrices)
def test_dominates_every_direction_and_is_attained(matrix):
    norm = operator_norm(matrix)
    directions = np.random.default_rng(0).normal(size=(matrix.shape[1], 20))
    directions /= np.linalg.norm(directions, axis=0)
    assert np.linalg.norm(matrix @ directions, axis=0).max() <= SAFETY * norm + 1e-300
    # The top eigenvector of the Gram matrix attains it, up to the square root of rounding.
    top = np.linalg.eigh(matrix.T @ matrix)[1][:, -1]
    assert np.linalg.norm(matrix @ top) >= (1 - 1e-7) * norm - 1e-7


@bounded
@hypothesis.given(matrices)
def test_is_the_same_for_the_transpose(matrix):
    assert operator_norm(matrix.T) == pytest.approx(operator_norm(matrix), rel=1e-12)


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-30, 1.0, 1e30, 1e200, 1e300])
def test_scales_with_the_matrix_without_overflow_or_underflow(size):
    matrix = np.random.default_rng(1).normal(size=(4, 3))
    expected = operator_norm(matrix) * size
    # Entries near 1e-320 are subnormal and carry few digits.
    assert operator_norm(matrix * size) == pytest.approx(
        expected, rel=1e-3 if size < 1e-300 else 1e-12
    )


def test_a_batch_gives_the_norms_of_its_matrices():
    batch = np.random.default_rng(2).normal(size=(2, 3, 4, 5))
    batch[0, 1, 2, 3] = np.nan
    batch[1, 2] = 0.0
    norms = operator_norm(batch)
    assert norms.shape == (2, 3)
    assert norms[0, 1] == np.inf and norms[1, 2] == 0.0
    for index in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert norms[index] == pytest.approx(operator_norm(batch[index]), rel=1e-13)


@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf])
def test_is_infinite_when_an_entry_is_not_finite(entry):
    matrix = np.eye(3)
    matrix[1, 2] = entry
    assert operator_norm(matrix) == np.inf


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_is_zero_without_entries(shape):
    assert operator_norm(np.zeros(shape)) == 0.0
    assert (operator_norm(np.zeros((2, *shape))) == 0.0).all()


def test_takes_low_precision_as_the_numbers_it_holds():
    matrix = np.random.default_rng(3).normal(size=(40, 30)).astype(np.float32)
    assert operator_norm(matrix) == operator_norm(matrix.astype(np.float64))
    assert type(operator_norm(matrix)) is float


def test_refuses_vectors():
    with pytest.raises(ValueError, match=r"two axes.*Received: shape=\(3,\)"):
        operator_norm(np.ones(3))


@pytest.mark.parametrize("shape", [(130, 3), (3, 130), (150, 140), (2, 3, 128, 16), (4, 8, 200)])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_a_large_matrix_gets_an_upper_bound_close_by(shape, size):
    matrix = np.random.default_rng(4).normal(size=shape)
    tied = np.sign(matrix[..., :1]) * np.ones(shape)
    orthogonal = np.linalg.svd(matrix, full_matrices=False)
    for case in (matrix, tied, orthogonal.U @ orthogonal.Vh, 0.0 * matrix):
        exact, fast = operator_norm(case * size), fast_operator_norm(case * size)
        assert np.shape(fast) == shape[:-2]
        # A decomposition is off by a few roundings in either direction.
        assert np.all(fast >= exact * (1.0 - 1e-14))
        assert np.all(fast <= exact * (1.0 + 2e-9))


def test_the_fast_norm_is_infinite_where_an_entry_is_not_finite():
    batch = np.ones((2, 130, 3))
    batch[0, 5, 1] = np.nan
    np.testing.assert_allclose(fast_operator_norm(batch), [np.inf, np.sqrt(390.0)])
    assert fast_operator_norm(np.zeros((0, 200))) == 0.0
