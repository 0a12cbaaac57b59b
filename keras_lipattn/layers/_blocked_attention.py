"""Softmax attention in blocks of queries: memory linear in the sequence length, both ways.

The forward pass keeps the output and one number a row; the backward pass computes the weights of a
block again. Loops are written out on both sides instead of differentiated, so that they compile
under XLA, whose loops have no memory of their iterations.

Reference:
    Rabe, Staats, "Self-attention does not need O(n^2) memory", 2021; Dao, Fu, Ermon, Rudra, Re,
    "FlashAttention", 2022 (the backward pass).
"""

import math
from typing import Any

from keras import ops

# Entries of one block of scores, over batch and heads: 16 MiB in float32, of which a backward pass
# holds about four at a time.
BLOCK_ENTRIES = 2**22


def attend_in_blocks(queries, keys, values, *, hide, block_size, relative_bias: Any = None):
    """`softmax(queries keys^T + biases, hidden pairs left out) values` in linear memory.

    Args:
        queries: Tensor `(B, H, T, f)`, float32 or float64. Its length must be static.
        keys: Tensor `(B, H, T, f)`.
        values: Tensor `(B, H, T, k)` of the same dtype.
        hide: Function `(scores, start)` that returns the scores `(B, H, block_size, T)` of the
            queries from position `start` on, with those of hidden pairs far below all others. It
            must not depend on anything that needs a gradient.
        block_size: Number of queries at a time.
        relative_bias: `RelativeBias` of the scores, or `None`.

    Returns:
        Tensor `(B, H, T, k)`. It has first derivatives in reverse mode; JAX has no forward mode
        through it.
    """
    length = queries.shape[2]
    blocks = math.ceil(length / block_size)
    padded = blocks * block_size
    columns = ops.arange(length, dtype="int32")

    def rows_from(start):
        return start + ops.arange(block_size, dtype="int32")

    # No table or one: a function with a gradient of its own must see all that has one.
    @ops.custom_gradient
    def attend(queries, keys, values, *tables):
        transposed = ops.swapaxes(keys, -1, -2)

        def scores_of(block, start):
            scores = ops.matmul(block, transposed)
            for table in tables:
                scores = scores + relative_bias.at(rows_from(start), columns, table)
            return hide(scores, start)

        def forward(index, carry):
            output, peaks = carry
            start = index * block_size
            scores = scores_of(_rows(queries, start, block_size), start)
            peak = ops.logsumexp(scores, axis=-1, keepdims=True)
            mixed = ops.matmul(ops.exp(scores - peak), values)
            return _put(output, mixed, start), _put(peaks, peak, start)

        empty = ops.zeros_like(queries[..., :1])
        start = (ops.zeros_like(ops.matmul(empty, values[..., :1, :])), empty)
        output, peaks = ops.fori_loop(0, blocks, forward, start)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            # The part of a row's derivative which all its scores share.
            shared = ops.sum(upstream * output, axis=-1, keepdims=True)
            turned = ops.swapaxes(values, -1, -2)

            def backward(index, carry):
                to_queries, to_keys, to_values, *to_tables = carry
                start = index * block_size
                block = _rows(queries, start, block_size)
                above = _rows(upstream, start, block_size)
                scores = scores_of(block, start)
                weights = ops.exp(scores - _rows(peaks, start, block_size))
                slope = ops.matmul(above, turned) - _rows(shared, start, block_size)
                slope = weights * slope
                return (
                    _put(to_queries, ops.matmul(slope, keys), start),
                    to_keys + ops.matmul(ops.swapaxes(slope, -1, -2), block),
                    to_values + ops.matmul(ops.swapaxes(weights, -1, -2), above),
                    *(
                        table
                        + relative_bias.collect(ops.sum(slope, axis=0), rows_from(start), columns)
                        for table in to_tables
                    ),
                )

            inputs = (queries, keys, values, *tables)
            zeros = tuple(ops.zeros_like(tensor) for tensor in inputs)
            return ops.fori_loop(0, blocks, backward, zeros)

        return output, gradient

    # Queries beyond the end see what others see and are cut off: their gradient is zero.
    queries = ops.pad(queries, ((0, 0), (0, 0), (0, padded - length), (0, 0)))
    tables = () if relative_bias is None else (relative_bias.table,)
    output: Any = attend(queries, keys, values, *tables)
    return output[:, :, :length]


def block_size_for(batch, heads, length):
    """Number of queries at a time for sequences of `length`; a power of two."""
    fitting = BLOCK_ENTRIES // max(1, (batch or 1) * heads * length)
    return 2 ** max(4, min(9, int(math.log2(max(1, fitting)))))


def _rows(tensor, start, size):
    shape = ops.shape(tensor)
    return ops.slice(tensor, (0, 0, start, 0), (shape[0], shape[1], size, shape[3]))


def _put(tensor, block, start):
    return ops.slice_update(tensor, (0, 0, start, 0), block)
