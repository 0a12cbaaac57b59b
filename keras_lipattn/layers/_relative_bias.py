"""Biases of scores by relative position, `b[i - j]`, and their gradient."""

from keras import ops


class RelativeBias:
    """Biases of one call; positions further apart than the largest lag share its bias.

    Args:
        table: Tensor `(H, 2 * R)`: of the keys R to 1 positions after a query, then of those 1 to R
            before it. The own key has none, which softmax makes the unit of the others.
    """

    def __init__(self, table):
        self._reach = table.shape[1] // 2
        own = ops.zeros_like(table[:, :1])
        self.table = ops.concatenate(
            [table[:, : self._reach], own, table[:, self._reach :]], axis=1
        )

    def at(self, rows, columns, table=None):
        """Biases `(H, R, T)` of queries over keys, at positions `(R,)` and `(T,)`."""
        table = self.table if table is None else table
        return ops.take(table, self._indices(rows, columns), axis=1)

    def collect(self, slope, rows, columns):
        """The derivative of `table`, from that of what `at` returns."""
        indices = ops.reshape(self._indices(rows, columns), (-1,))
        entries = ops.transpose(ops.reshape(slope, (slope.shape[0], -1)))
        total = ops.segment_sum(entries, indices, num_segments=2 * self._reach + 1)
        return ops.transpose(total)

    def _indices(self, rows, columns):
        lag = ops.expand_dims(rows, 1) - ops.expand_dims(columns, 0)
        return ops.clip(lag, -self._reach, self._reach) + self._reach
