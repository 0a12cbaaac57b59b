"""Attention over several axes as attention over one: flattened row-major, the rest in the batch."""

import math

from keras import ops


class AttentionAxes:
    """Turns `(B, ..., D)` into sequences `(B', T, D)` and back.

    Args:
        axes: Axes of attention, or `None` for all between batch and features.
        shape: Static shape of the input.

    Raises:
        ValueError: If the input has fewer than three axes or no features, or `axes` are not
            different axes between batch and features.
    """

    def __init__(self, axes, shape):
        rank = len(shape)
        if rank < 3:
            raise ValueError(
                "`query` must have at least three axes, `(batch, tokens, features)`. "
                f"Received: query_shape={shape}"
            )
        if not shape[-1]:
            raise ValueError(
                "The last axis of `query` must be static and not empty. "
                f"Received: query_shape={shape}"
            )
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
        # In the order of `attention_axes`, as the scores of Keras have them.
        self._given = tuple(a % rank for a in chosen)

    @property
    def is_plain(self):
        """Whether inputs are `(B, T, D)` as they come."""
        return self._rank == 3

    def length(self, shape):
        """Number of tokens of a static shape, `None` if unknown."""
        return _product([shape[axis] for axis in self.axes])

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

    def score_shape(self, shape, num_heads, key_shape=None):
        """Shape of the scores, `(B, ..., H, queries..., keys...)`, as Keras has it.

        The axes without attention come before the heads. Those of queries and keys are in the
        order of `attention_axes`. `key_shape` is `shape` by default.
        """
        sides = [[one[axis] for axis in self._given] for one in (shape, key_shape or shape)]
        return (*self._outer(shape, num_heads), *sides[0], *sides[1])

    def restore_scores(self, scores, tensor, keys=None):
        """Scores `(B', H, T, S)` in the shape of `score_shape`."""
        if self._rank == 3:
            return scores
        shape = ops.shape(tensor)
        key_shape = shape if keys is None else ops.shape(keys)
        tokens = [[one[axis] for axis in self.axes] for one in (shape, key_shape)]
        sides = (*self._outer(shape, scores.shape[1]), *tokens[0], *tokens[1])
        places = [self.axes.index(axis) for axis in self._given]
        return ops.transpose(ops.reshape(scores, sides), self._order_of_scores(places))

    def mask_shapes(self, shape, num_heads, key_shape=None):
        """Shapes of a mask of pairs by rank; a side of 1 is legal in place of any of these.

        They are what Keras broadcasts to `score_shape`: the axes of queries and keys come last,
        those before them are the first ones of the scores. With several axes of attention a mask
        of the flattened tokens, `(T, T)` or `(B, T, T)`, is legal too.
        """
        full = self.score_shape(shape, num_heads, key_shape)
        lengths = self.length(shape), self.length(key_shape or shape)
        outer = 2 + len(self._others)
        shapes = [lengths, (shape[0], *lengths)]
        shapes += [(*full[:lead], *full[outer:]) for lead in range(outer + 1)]
        # Where two have the same rank, the later one stays, which is that of Keras.
        return {len(shape): shape for shape in shapes}

    def flatten_pairs(self, mask, tensor, keys=None):
        """A mask of one of `mask_shapes` as one that broadcasts to `(B', H, T, S)`."""
        rank, outer = len(mask.shape), 2 + len(self._others)
        flattened = rank < 2 * len(self.axes)
        lead = rank - (2 if flattened else 2 * len(self.axes))
        for _ in range(outer - lead):
            mask = ops.expand_dims(mask, lead)
        if self._rank == 3:
            return mask
        shape = ops.shape(tensor)
        key_shape = shape if keys is None else ops.shape(keys)
        *sequences, heads = self._outer(shape, ops.shape(mask)[outer - 1])
        if flattened:
            tokens = [[self._tokens(one)] for one in (shape, key_shape)]
        else:
            tokens = [[one[axis] for axis in self.axes] for one in (shape, key_shape)]
            places = [self._given.index(axis) for axis in self.axes]
            mask = ops.transpose(mask, self._order_of_scores(places))
        return _merge(mask, [sequences, [heads], *tokens])

    def _outer(self, shape, num_heads):
        """The first sides of `score_shape`."""
        return *(shape[axis] for axis in (0, *self._others)), num_heads

    def _order_of_scores(self, places):
        """Order of the axes of `score_shape` that moves those of attention to `places`."""
        first = 2 + len(self._others)
        queries = [first + place for place in places]
        return [*range(first), *queries, *(len(places) + axis for axis in queries)]

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


def _merge(mask, groups):
    """The axes of each group made one, which keeps a side of 1 if all of them do."""
    for place, group in enumerate(groups):
        if len(group) == 1:
            continue
        sides, end = ops.shape(mask), place + len(group)
        if all(side == 1 for side in mask.shape[place:end]):
            group = [1]
        else:
            # One group at a time: TensorFlow has no broadcast of many axes in turns.
            mask = ops.broadcast_to(mask, (*sides[:place], *group, *sides[end:]))
        mask = ops.reshape(mask, (*sides[:place], math.prod(group), *sides[end:]))
    return mask


def _product(sides):
    return None if any(side is None for side in sides) else math.prod(sides)
