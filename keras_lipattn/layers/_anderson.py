"""Anderson's extrapolation of a fixed-point iteration from its last few steps."""

import keras
import numpy as np
from keras import ops

# Relative Tikhonov term of the least squares problem, by dtype: about the rounding error of the
# inner products of unit vectors. It also makes the problem solvable before the memory is full.
_RIDGE = {"float32": 1e-6, "float64": 1e-14}


class AndersonMemory:
    """Differences of the last iterates and of their residuals, for each example of a batch.

    The state is a pair of tensors `(B, memory, n)`, so that it fits into a loop of a graph. Rows
    of zeros are empty places.

    Args:
        size: Number of differences to remember; 0 extrapolates nothing.

    Reference:
        Walker, Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """

    def __init__(self, size):
        self.size = size

    def empty(self, iterate):
        """The empty state for iterates like `iterate` `(B, n)`."""
        if not self.size:
            return ()
        zeros = ops.repeat(ops.zeros_like(iterate)[:, None], self.size, axis=1)
        return zeros, zeros

    def extend(self, state, moved, changed, keep):
        """Remembers the step `moved` and the change `changed` of the residual, both `(B, n)`.

        Where `keep` `(B,)` is false everything is forgotten instead.
        """
        if not self.size:
            return ()
        keep = keep[:, None, None]
        pairs = zip(state, (moved, changed), strict=True)
        extended = [ops.concatenate([old[:, 1:], new[:, None]], axis=1) for old, new in pairs]
        return tuple(ops.where(keep, array, ops.zeros_like(array)) for array in extended)

    def next(self, state, iterate, residual):
        """The next point to try `(B, n)`: the fixed point if the map were linear on the memory."""
        if not self.size:
            return iterate + residual
        moved, changed = state
        length = ops.sqrt(ops.sum(ops.square(changed), axis=-1, keepdims=True))
        # Differences shrink as the iteration converges: scaled to one, all weigh alike.
        length = ops.where(length > 0, length, ops.ones_like(length))
        moved, changed = moved / length, changed / length
        gram = ops.matmul(changed, ops.swapaxes(changed, 1, 2))
        right = ops.matmul(changed, residual[..., None])
        weights = _solve_positive(gram, right)
        return iterate + residual - ops.sum(weights * (moved + changed), axis=1)


def _solve_positive(matrix, right):
    """`(matrix + ridge)^{-1} right` for a positive semidefinite `(B, m, m)` with unit diagonal.

    Elimination without pivots, which such a matrix does not need, written out: backends disagree
    on which decompositions they can compile.
    """
    size = matrix.shape[-1]
    ridge = _RIDGE[keras.backend.standardize_dtype(matrix.dtype)]
    unit = np.eye(size, dtype=keras.backend.standardize_dtype(matrix.dtype))
    system = ops.concatenate([matrix + ridge * unit, right], axis=-1)
    for index in range(size):
        pivot = system[:, index : index + 1]
        # Rounding may leave next to nothing of a row that depends on those before it.
        row = pivot / ops.maximum(pivot[..., index : index + 1], ridge)
        # Clears the column from the other rows, and leaves `row` in its own.
        system = system - (system[:, :, index : index + 1] - unit[:, index : index + 1]) * row
    return system[..., size:]
