"""Norms of large matrices, which a Cholesky factorization proves."""

import numpy as np
import pytest
import scipy.linalg

from keras_lipattn.linalg import exact, fast_operator_norm, operator_norm

# A decomposition in float64 is off by a few hundred roundings in either direction.
DECOMPOSITION = 1e-13
SHAPES = [(128, 1), (1, 300), (128, 128), (200, 129), (129, 600), (600, 140), (257, 256)]


def gaussian(rng, shape):
    return rng.normal(size=shape)


def rank_one(rng, shape):
    return np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))


def with_values(values):
    """Singular values between 0 and 1, from a function of the number of them."""

    def matrix(rng, shape):
        side = min(shape)
        left, _ = np.linalg.qr(rng.normal(size=(shape[0], side)))
        right, _ = np.linalg.qr(rng.normal(size=(shape[1], side)))
        return left * values(side) @ right.T

    return matrix


def one_entry(rng, shape):
    matrix = np.zeros(shape)
    matrix[-1, -1] = -3.0
    return matrix


def unbalanced(rng, shape):
    """Rows and columns between 1e-200 and 1: most squares underflow."""
    rows, columns = (10.0 ** rng.uniform(-100, 0, size=size) for size in shape)
    return rng.normal(size=shape) * rows[:, None] * columns


def subnormal_and_one(rng, shape):
    matrix = 5e-324 * rng.integers(-3, 4, size=shape)
    matrix[0, 0] = 1.0
    return matrix


def orthogonal_to_the_start(rng, shape):
    """The iteration begins orthogonal to the leading vector, up to rounding."""
    side = min(shape)
    start = np.random.default_rng(0).standard_normal(side)
    leading = rng.normal(size=side)
    leading -= start * (start @ leading) / (start @ start)
    narrow = np.eye(side, max(shape)) + np.outer(leading, np.ones(max(shape)))
    return narrow if shape[0] == side else narrow.T


MATRICES = {
    "gaussian": gaussian,
    "rank one": rank_one,
    "positive": lambda rng, shape: rng.uniform(size=shape),
    "one entry": one_entry,
    "zero": lambda rng, shape: np.zeros(shape),
    "equal values": with_values(np.ones),
    "two equal values": with_values(
        lambda side: np.r_[[1.0, 1.0][:side], np.full(side, 0.3)][:side]
    ),
    "nearly equal values": with_values(lambda side: 1.0 - 1e-7 * np.arange(side) / side),
    "dense at the top": with_values(lambda side: 1.0 - (np.arange(side) / side) ** 2),
    "ill conditioned": with_values(lambda side: np.logspace(0, -16, side)),
    "unbalanced": unbalanced,
    "subnormal entries": subnormal_and_one,
    "orthogonal to the start": orthogonal_to_the_start,
    "float32": lambda rng, shape: rng.normal(size=shape).astype(np.float32),
}
# A zero matrix has no direction, and the shift of the factorization is zero then.
NONZERO = {name: make for name, make in MATRICES.items() if name != "zero"}
# Its leading eigenvalues are too close for as many steps as there are rows.
ESTIMATED = [name for name in NONZERO if name != "dense at the top"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_a_proved_norm_is_an_upper_bound_close_by(name, shape):
    rng = np.random.default_rng(5)
    matrix = np.asarray(MATRICES[name](rng, shape), np.float64)
    for size in (1e-290, 1e-150, 1.0, 1e150, 1e290):
        scaled = matrix * size
        expected, found = operator_norm(scaled), fast_operator_norm(scaled)
        assert found >= expected * (1.0 - DECOMPOSITION)
        assert found <= expected * (1.0 + 2e-9) + 1e-322


@pytest.mark.parametrize("size", [5e-324, 1e-322, 1e-310, 2.2e-308])
def test_a_subnormal_norm_is_not_rounded_down(size):
    # All entries are equal: the norm is sqrt(150 * 130) times the entry.
    matrix = np.full((150, 130), size)
    exact_square = 150 * 130 * int(size / 5e-324) ** 2
    found = int(fast_operator_norm(matrix) / 5e-324)
    assert found**2 >= exact_square
    assert (found - 2) ** 2 <= exact_square * (1.0 + 5e-9)


def test_norms_known_exactly_are_not_undercut():
    # A Hadamard matrix of side n has the norm sqrt(n), a diagonal one its largest entry.
    for side in (128, 256, 512):
        assert fast_operator_norm(scipy.linalg.hadamard(side).astype(float)) ** 2 >= side
    for entry in (1.0, np.nextafter(1.0, 2.0), np.pi):
        assert fast_operator_norm(np.diag(np.linspace(entry, 0.1, 200))) >= entry


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999, 1.0 - 1e-6, 1.0 - 1e-8])
@pytest.mark.parametrize("name", NONZERO)
def test_the_factorization_refuses_an_estimate_that_is_too_low(name, share, monkeypatch):
    matrix = np.asarray(NONZERO[name](np.random.default_rng(6), (150, 180)), np.float64)
    estimate = exact._eigenvalue_estimate
    monkeypatch.setattr(exact, "_eigenvalue_estimate", lambda gram: share * estimate(gram))
    expected, found = operator_norm(matrix), fast_operator_norm(matrix)
    assert expected * (1.0 - DECOMPOSITION) <= found <= expected * (1.0 + 2e-9)


@pytest.mark.parametrize("name", ESTIMATED)
def test_one_factorization_is_enough(name, monkeypatch):
    matrix = np.asarray(NONZERO[name](np.random.default_rng(7), (150, 180)), np.float64)

    def refused(gram):
        raise AssertionError("All eigenvalues were computed.")

    monkeypatch.setattr(exact, "_all_eigenvalues", refused)
    fast_operator_norm(matrix)


def test_the_layout_of_the_memory_does_not_matter():
    matrix = np.random.default_rng(8).normal(size=(2, 300, 140))
    expected = fast_operator_norm(matrix[0])
    wider = np.zeros((600, 280))
    wider[::2, ::2] = matrix[0]
    read_only = matrix[0].copy()
    read_only.setflags(write=False)
    for view in (
        np.asfortranarray(matrix[0]),
        matrix[0].T,
        matrix[0].T.copy(),
        matrix[0][::-1],
        matrix[0][:, ::-1],
        wider[::2, ::2],
        wider[::2, ::2].T,
        read_only,
    ):
        before = view.copy()
        assert fast_operator_norm(view) == pytest.approx(expected, rel=2e-9)
        np.testing.assert_array_equal(view, before)
    batch = np.stack([matrix, 0.0 * matrix, 1e200 * matrix])
    np.testing.assert_allclose(fast_operator_norm(batch), operator_norm(batch), rtol=2e-9)


def test_every_width_is_proved():
    rng = np.random.default_rng(9)
    for side in (*range(126, 136), 255, 256, 257, 511, 512, 513, 600):
        matrix = rng.normal(size=(side, side + int(rng.integers(3))))
        expected, found = operator_norm(matrix), fast_operator_norm(matrix)
        assert expected * (1.0 - DECOMPOSITION) <= found <= expected * (1.0 + 2e-9)


def test_a_norm_is_proved_where_no_estimate_is_found(monkeypatch):
    def fails(*_, **__):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(exact, "eigh_tridiagonal", fails)
    matrix = np.random.default_rng(5).normal(size=(200, 129))
    expected, found = operator_norm(matrix), fast_operator_norm(matrix)
    assert expected * (1.0 - DECOMPOSITION) <= found <= expected * (1.0 + 2e-9)
