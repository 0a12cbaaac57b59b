"""How attention is cut into blocks of queries, and which keys a block takes."""

import math
from typing import NamedTuple

import keras
from keras import ops

# Entries of one block of scores. On TensorFlow a block has a single head, and fits the cache of a
# processor. Elsewhere it has all heads of all examples, for the sake of accelerators.
BLOCK_ENTRIES_OF_HEAD = 2**20
BLOCK_ENTRIES = 2**22
# The fewest and the most queries of a block.
BLOCK_SIZES = (16, 512)
# With a causal mask the share `(1 + 1 / CAUSAL_SPANS) / 2` of the scores is computed.
CAUSAL_SPANS = 8


class Span(NamedTuple):
    """Blocks with the same number of keys.

    Attributes:
        first_row: Position of the first query.
        steps: Number of steps, each of which takes `Layout.tiles` blocks.
        width: Number of keys: the first ones, or with `Layout.sliding` those around a block.
    """

    first_row: int
    steps: int
    width: int


class Layout(NamedTuple):
    """How attention is cut into blocks.

    Attributes:
        block_size: Number of queries of a block.
        spans: The `Span`s of all queries, the last of which may be longer than the sequence.
        tiles: Number of blocks at a time. Several only if `sliding`.
        sliding: Whether the keys of a block move with it.
        before: Number of keys before the first query of a block, if they move: some blocks.
        after: Number of keys after its last query, if they move: some blocks.
    """

    block_size: int
    spans: tuple[Span, ...]
    tiles: int = 1
    sliding: bool = False
    before: int = 0
    after: int = 0

    @property
    def step_size(self):
        """Number of queries at a time."""
        return self.block_size * self.tiles

    @property
    def rows(self):
        """Number of queries of all blocks."""
        return self.step_size * sum(span.steps for span in self.spans)


def layout_for(length, groups, mask):
    """`Layout` for sequences of `length` tokens.

    Args:
        length: Number of tokens.
        groups: Number of examples times number of heads.
        mask: `Mask` of the call.
    """
    fitting = BLOCK_ENTRIES_OF_HEAD if head_by_head() else BLOCK_ENTRIES // max(1, groups)
    if mask.sliding_window is not None:
        reach = min(mask.sliding_window, length) - 1
        size = _power_of_two(reach)
        # Multiples of blocks, so that what later blocks no longer reach is a block, too.
        before = math.ceil(reach / size) * size
        after = 0 if mask.use_causal_mask else before
        width = before + size + after
        if width < length:
            blocks = math.ceil(length / size)
            tiles = 1 if mask.attention_mask is not None else max(1, fitting // (size * width))
            steps = math.ceil(blocks / tiles)
            tiles = math.ceil(blocks / steps)
            return Layout(size, (Span(0, steps, width),), tiles, True, before, after)
    spans = CAUSAL_SPANS if mask.use_causal_mask else 1
    blocks = math.ceil(length / _power_of_two(min(fitting, length**2 // spans) // length))
    spans = min(blocks, spans)
    of_span = math.ceil(blocks / spans)
    # Blocks of the same size: few queries are added to fill the last one.
    size = math.ceil(length / (of_span * spans))
    found, row = [], 0
    while row < length:
        count = min(of_span, math.ceil((length - row) / size))
        end = row + count * size
        found.append(Span(row, count, min(length, end) if mask.use_causal_mask else length))
        row = end
    return Layout(size, tuple(found))


class Block:
    """The queries of a step and the keys they take, as `(g, tiles, ...)`."""

    def __init__(self, layout, span, index):
        self.layout = layout
        self.span = span
        # The first query. The first key, among the padded ones.
        self.start = span.first_row + index * layout.step_size
        self.first_key = self.start if layout.sliding else 0

    @property
    def rows(self):
        """Positions of the queries of a tile, relative to the first of them if keys move with it.

        Lags alone matter. Those are then the same for all tiles: constants in a graph.
        """
        rows = ops.arange(self.layout.block_size, dtype="int32")
        return rows if self.layout.sliding else self.start + rows

    @property
    def columns(self):
        """Positions of the keys of a tile, relative to the same."""
        return ops.arange(self.span.width, dtype="int32") - self.layout.before

    def rows_of(self, tensor):
        """The queries' part of `tensor` `(g, rows, f)`, `(g, tiles, block_size, f)`."""
        layout = self.layout
        part = _slice(tensor, self.start, layout.step_size)
        groups, _, features = ops.shape(part)
        return ops.reshape(part, (groups, layout.tiles, layout.block_size, features))

    def join_rows(self, tiles):
        """`(g, step_size, f)` from tiles of queries."""
        groups, count, size, features = ops.shape(tiles)
        return ops.reshape(tiles, (groups, count * size, features))

    def keys_of(self, tensor):
        """The keys' part of `tensor` `(g, T', f)`, `(g, tiles, width, f)`."""
        layout = self.layout
        if not layout.sliding:
            return tensor[:, None, : self.span.width]
        part = _slice(tensor, self.first_key, layout.step_size + layout.before + layout.after)
        if layout.tiles == 1:
            return part[:, None]
        groups, _, features = ops.shape(part)
        shape = (groups, layout.tiles, layout.block_size, features)
        shifted = [ops.reshape(part[:, at : at + layout.step_size], shape) for at in self._shifts]
        return ops.concatenate(shifted, axis=2)

    def join_keys(self, tiles):
        """What `keys_of` returns, added where it came from."""
        layout = self.layout
        if layout.tiles == 1:
            return tiles[:, 0]
        end, total = layout.before + layout.after, 0
        for at in self._shifts:
            part = self.join_rows(tiles[:, :, at : at + layout.block_size])
            total = total + pad_rows(part, at, end - at)
        return total

    @property
    def _shifts(self):
        return range(0, self.span.width, self.layout.block_size)


def head_by_head():
    """Whether a block has a single head."""
    return keras.backend.backend() == "tensorflow"


def pad_rows(tensor, before, after, value=0.0):
    """`tensor` with further rows, its next to last axis, on both sides."""
    if not (before or after):
        return tensor
    extra = [(0, 0)] * (len(tensor.shape) - 2) + [(before, after), (0, 0)]
    return ops.pad(tensor, extra, constant_values=value)


def _slice(tensor, start, size):
    groups, _, features = ops.shape(tensor)
    return ops.slice(tensor, (0, start, 0), (groups, size, features))


def _power_of_two(number):
    """The largest block size up to `number`, or the smallest of all."""
    least, most = BLOCK_SIZES
    return max(least, min(most, 2 ** int(math.log2(max(1, number)))))
