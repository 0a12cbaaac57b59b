"""Attention over several axes as attention over one: flattened row-major, the rest in the batch."""

import math

from keras import ops


class AttentionAxes:
    """Turns `(B, ..., D)` into sequences `(B', T, D)` and back.

    Args:
        rank: Rank of the input.
        axes: Axes of attention, or `None` for all between batch and features.
        shape: Static shape of the input, for errors and lengths.

    Raises:
        ValueError: If `axes` are not different axes between batch and features.
    """

    def __init__(self, rank, axes, shape):
        chosen = tuple(range(1, rank - 1)) if axes is None else axes
        self.axes = tuple(sorted(a % rank if -rank <= a < rank else -1 for a in chosen))
        distinct = len(set(self.axes)) == len(self.axes)
        if not distinct or not all(1 <= axis <= rank - 2 for axis in self.axes):
            raise ValueError(
                "`attention_axes` must be different axes between batch and features. "
                f"Received: attention_axes={axes}, query_shape={tuple(shape)}"
            )
        self._rank = rank
        self._others = [axis for axis in range(1, rank - 1) if axis not in self.axes]
        self._order = [0, *self._others, *self.axes]

    @property
    def is_plain(self):
        """Whether inputs are `(B, T, D)` as they come."""
        return self._rank == 3

    def length(self, shape):
        """Number of tokens of a static shape, `None` if unknown."""
        return _product([shape[axis] for axis in self.axes])

    def batch(self, shape):
        """Number of sequences of a static shape, `None` if unknown."""
        return _product([shape[axis] for axis in (0, *self._others)])

    def flatten(self, tensor):
        """`(B, ..., D)` as `(B', T, D)`."""
        if self._rank == 3:
            return tensor
        shape = ops.shape(tensor)
        moved = ops.transpose(tensor, [*self._order, self._rank - 1])
        return ops.reshape(moved, (self._sequences(shape), self._tokens(shape), shape[-1]))

    def flatten_mask(self, mask):
        """`(B, ...)` as `(B', T)`."""
        if self._rank == 3:
            return mask
        shape = ops.shape(mask)
        moved = ops.transpose(mask, self._order)
        return ops.reshape(moved, (self._sequences(shape), self._tokens(shape)))

    def repeat_mask(self, attention_mask, tensor):
        """A mask `(B, H, T, T)` given per example, for every sequence of the example."""
        if not self._others or attention_mask.shape[0] == 1:
            return attention_mask
        shape = ops.shape(tensor)
        repeats = math.prod(shape[axis] for axis in self._others)
        return ops.repeat(attention_mask, repeats, axis=0)

    def restore(self, sequences, tensor):
        """`(B', T, O)` in the layout of `tensor`, which was flattened before."""
        if self._rank == 3:
            return sequences
        shape = ops.shape(tensor)
        moved = ops.reshape(
            sequences, (*(shape[axis] for axis in self._order), sequences.shape[-1])
        )
        order = [*self._order, self._rank - 1]
        return ops.transpose(moved, [order.index(axis) for axis in range(self._rank)])

    def _sequences(self, shape):
        # Spelled out: an empty tensor leaves no size to infer.
        return math.prod(shape[axis] for axis in (0, *self._others))

    def _tokens(self, shape):
        return math.prod(shape[axis] for axis in self.axes)


def _product(sides):
    return None if any(side is None for side in sides) else math.prod(sides)
