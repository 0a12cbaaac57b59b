"""Norms of majorants in the Gaussian kernel's Hilbert space: bounds of column sums.

Lemma 3.4 of docs/theory.md. Each value is the norm of one explicit function, so every choice
of the free parameters `(s, x)` is valid and a grid search loses nothing but sharpness.
"""

import functools

import numpy as np
import numpy.typing as npt

# Lemma 3.4: t^2 exp(-t^2) has a majorant of norm 0.5158595, rounded up.
SQUARE_MAJORANT = 0.51586
# Split of the constant term in Theorem 3.B; 0 first.
SPLITS = np.concatenate([[0.0], np.geomspace(0.1, 400.0, 44)])


def majorant_norm(constant: npt.ArrayLike, gain: float) -> npt.NDArray[np.float64]:
    """Norm of a function above `exp(-|e|^2) (constant + gain (e.v)^2)`.

    Args:
        constant: float or array of shape `(...)`.
        gain: positive float.

    Returns:
        Float64 array of shape `(...)`, rounded by no more than a few units in the last place.
    """
    amplitude, drop, excess = _shapes()
    constant = np.asarray(constant, np.float64)[..., None]
    amplitude = gain * amplitude
    squares = (constant + gain * drop + amplitude) ** 2 + 2.0 * (amplitude * excess) ** 2
    return np.sqrt(squares.min(axis=-1))


def majorant_table(beta: float) -> npt.NDArray[np.float64]:
    """`majorant_norm(1 - c, 1 / beta)` for `c` in `SPLITS`, shape `(45,)`."""
    return majorant_norm(1.0 - SPLITS, 1.0 / beta)


@functools.cache
def _shapes() -> tuple[npt.NDArray[np.float64], ...]:
    s = np.geomspace(0.25, 2.2, 48)[:, None]
    x = np.geomspace(0.25, 6.5, 64)[None, :]
    amplitude = x / (2.0 * s * s * np.sinh(x))
    drop = (x * x - 2.0 * x / np.tanh(x)) / (4.0 * s * s)
    excess = np.broadcast_to(np.sinh(s * s), amplitude.shape)
    return amplitude.ravel(), drop.ravel(), excess.ravel()
