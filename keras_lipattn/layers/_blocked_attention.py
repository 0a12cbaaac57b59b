"""Softmax attention in blocks of queries: memory linear in the sequence length, both ways.

The forward pass keeps the output alone; the backward pass computes the weights of a block again.
Loops are written out on both sides instead of differentiated, so that they compile under XLA, whose
loops have no memory of their iterations.

Blocks leave out keys that none of their queries see. With a causal mask the queries are cut into a
few spans, each of which takes the keys up to its end. With a window each block takes the keys
around it.

Reference:
    Rabe, Staats, "Self-attention does not need O(n^2) memory", 2021; Dao, Fu, Ermon, Rudra, Re,
    "FlashAttention", 2022 (the backward pass).
"""

from typing import Any

import keras
from keras import ops

from keras_lipattn.layers._block_layout import Block, head_by_head, layout_for, pad_rows
from keras_lipattn.layers._masks import HIDDEN, masked_softmax

# Golden ratio times 2**31: makes seeds of blocks unlike those that a user counts up.
_SEED_STEP = 1327217885


def attend_in_blocks(queries, keys, values, mask, *, dropout=0.0, seed=None, layout=None):
    """`softmax(queries keys^T + biases, hidden pairs left out) values` in linear memory.

    Args:
        queries: Tensor `(B, H, T, f)`, float32 or float64, whose last feature is one. Its length
            must be static.
        keys: Tensor `(B, H, T, f)`, whose last feature is a bias of the key, padding included.
        values: Tensor `(B, H, T, k)` of the same dtype.
        mask: `Mask` of the call.
        dropout: Probability that a weight is dropped. Only on TensorFlow.
        seed: Integer tensor `(2,)`, the seed of the dropout.
        layout: The `Layout`; by default that of `layout_for`.

    Returns:
        Tensor `(B, H, T, k)`. It has first derivatives in reverse mode; JAX has no forward mode
        through it.
    """
    batch, heads, length, _ = ops.shape(queries)
    if layout is None:
        layout = layout_for(length, (queries.shape[0] or 1) * heads, mask)
    if dropout:
        values = values / (1.0 - _dropped(dropout) / 2**16)
    missing = layout.rows - length
    tensors = [pad_rows(queries, 0, missing), keys, values]
    if layout.sliding:
        end = missing + layout.after
        features = pad_rows(keys[..., :-1], layout.before, end)
        bias = pad_rows(keys[..., -1:], layout.before, end, HIDDEN)
        tensors[1:] = (
            ops.concatenate([features, bias], axis=-1),
            pad_rows(values, layout.before, end),
        )
    if mask.relative_bias is not None:
        table = mask.relative_bias.table
        tensors.append(ops.broadcast_to(table[:, None], (batch, heads, 1, table.shape[-1])))
    tensors = [ops.reshape(t, (batch * heads, *ops.shape(t)[2:])) for t in tensors]
    blocks = _Blocks(mask, layout, (batch, heads, length), dropout, seed)

    # A function with a gradient of its own must see all that has one.
    @ops.custom_gradient
    def attend(*tensors):
        queries, _, values = tensors[:3]
        shapes = [(queries.shape[1], values.shape[-1])]
        (output,) = _for_each_group(blocks.attend, tensors, shapes)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            # The part of a row's derivative which all its scores share.
            shared = ops.sum(upstream * output, axis=-1, keepdims=True)
            shapes = [tensor.shape[1:] for tensor in tensors]
            return _for_each_group(blocks.differentiate, (upstream, shared, *tensors), shapes)

        return output, gradient

    output: Any = attend(*tensors)
    return ops.reshape(output[:, :length], (batch, heads, length, values.shape[-1]))


class _Blocks:
    """Attention of groups of heads, block by block, and its derivative.

    Groups are tensors `(g, rows, f)` of queries, `(g, T', f)` of keys, `(g, T', k)` of values, and
    `(g, 1, lags)` of relative biases, if there are any. Rows and keys are padded to the layout.
    """

    def __init__(self, mask, layout, sides, dropout, seed):
        self.mask = mask
        self.layout = layout
        self.sides = sides
        self.dropout = dropout
        self.seed = seed
        self.attention_mask = self._padded_attention_mask()

    def attend(self, group, queries, keys, values, *tables):
        parts = []
        for span in self.layout.spans:

            def step(_, index, span=span):
                block = Block(self.layout, span, index)
                weights = self._weights(group, block, queries, keys, tables)
                if self.dropout:
                    weights = weights * self._kept(group, block, weights)
                return (), (block.join_rows(_product(weights, block.keys_of(values))),)

            shapes = [(self.layout.step_size, values.shape[-1])]
            _, (mixed,) = _scan(step, (), span.steps, shapes, queries.dtype)
            parts.append(mixed)
        return (_concatenate(parts),)

    def differentiate(self, group, upstream, shared, queries, keys, values, *tables):
        layout = self.layout
        carry = (
            ops.zeros_like(keys),
            ops.zeros_like(values),
            tuple(ops.zeros_like(table) for table in tables),
        )
        # The slope is `weights * (upstream values^T - shared)`. Without dropout what is shared
        # rides along as one more feature.
        above, mixed = upstream, values
        if not self.dropout:
            above = ops.concatenate([upstream, -shared], axis=-1)
            mixed = ops.concatenate([values, ops.ones_like(values[..., :1])], axis=-1)
        parts = []
        # The last span first: earlier ones have fewer keys.
        for span in reversed(layout.spans):

            def step(carry, index, span=span):
                to_keys, to_values, to_tables = carry
                block = Block(layout, span, index)
                weights = self._weights(group, block, queries, keys, tables)
                slope = _product(block.rows_of(above), block.keys_of(mixed), transpose_b=True)
                if self.dropout:
                    kept = self._kept(group, block, weights)
                    slope = weights * (kept * slope - block.rows_of(shared))
                    weights = weights * kept
                else:
                    slope = weights * slope
                done = (block.join_rows(_product(slope, block.keys_of(keys))),)
                of_keys = _product(slope, block.rows_of(queries), transpose_a=True)
                of_values = _product(weights, block.rows_of(upstream), transpose_a=True)
                to_keys = to_keys + block.join_keys(of_keys)
                to_values = to_values + block.join_keys(of_values)
                to_tables = tuple(
                    table + self._of_table(slope, block)[:, None] for table in to_tables
                )
                if layout.sliding:
                    # Later blocks do not reach the first keys of this step.
                    size = layout.step_size
                    done = (*done, to_keys[:, :size], to_values[:, :size])
                    to_keys = pad_rows(to_keys[:, size:], 0, size)
                    to_values = pad_rows(to_values[:, size:], 0, size)
                return (to_keys, to_values, to_tables), done

            to_keys, to_values, to_tables = carry
            seen = layout.step_size + layout.before + layout.after if layout.sliding else span.width
            carry = (to_keys[:, :seen], to_values[:, :seen], to_tables)
            shapes = [(layout.step_size, tensor.shape[-1]) for tensor in (queries, keys, values)]
            (to_keys, to_values, to_tables), done = _scan(
                step, carry, span.steps, shapes if layout.sliding else shapes[:1], queries.dtype
            )
            if layout.sliding:
                rest = layout.before + layout.after
                done[1] = ops.concatenate([done[1], to_keys[:, :rest]], axis=1)
                done[2] = ops.concatenate([done[2], to_values[:, :rest]], axis=1)
            else:
                # Earlier spans do not reach the keys from here on.
                done += [to_keys[:, span.first_row :], to_values[:, span.first_row :]]
            carry = (to_keys[:, : span.first_row], to_values[:, : span.first_row], to_tables)
            parts.insert(0, done)
        return (*map(_concatenate, zip(*parts, strict=True)), *carry[2])

    def _weights(self, group, block, queries, keys, tables):
        scores = _product(block.rows_of(queries), block.keys_of(keys), transpose_b=True)
        for table in tables:
            biases = self.mask.relative_bias.at(block.rows, block.columns, table[:, 0])
            scores = scores + biases[:, None]
        part = self._attention_mask_of(group, block)
        first = 0
        if part is None and self.mask.sliding_window is None:
            # All queries of a span see all keys before it.
            first = block.span.first_row
        visible = self.mask.visible(block.rows, block.columns[first:], part)
        if visible is not None:
            visible = visible[None, None] if len(visible.shape) == 2 else visible
            hidden = ops.where(visible, scores[..., first:], ops.cast(HIDDEN, scores.dtype))
            scores = ops.concatenate([scores[..., :first], hidden], axis=-1) if first else hidden
        return masked_softmax(scores, None)

    def _of_table(self, slope, block):
        return self.mask.relative_bias.collect(ops.sum(slope, axis=1), block.rows, block.columns)

    def _kept(self, group, block, weights):
        """Zero where a weight is dropped, one elsewhere."""
        import tensorflow as tf

        number = tf.convert_to_tensor(group * self.layout.rows + block.start, "int32")
        seed = tf.cast(self.seed % (2**31 - 1), "int32") + tf.stack([number * _SEED_STEP, 0])
        # Half of the random bits that a float takes.
        *sides, width = weights.shape
        full: Any = None  # The range: all of it.
        pairs = tf.random.stateless_uniform(
            (*sides, -(-width // 2)), seed, minval=full, maxval=full, dtype="int32"
        )
        random: Any = tf.reshape(tf.bitcast(pairs, "int16"), (*sides, -1))
        random = random[..., :width]
        return tf.cast(random >= _dropped(self.dropout) - 2**15, weights.dtype)

    def _padded_attention_mask(self):
        """The attention mask, padded where it is cut; sides of 1 stay."""
        given = self.mask.attention_mask
        if given is None:
            return None
        layout, length = self.layout, self.sides[2]
        sides = list(ops.shape(given))
        for axis in (2, 3):
            if given.shape[axis] is None:
                sides[axis] = length
        given = ops.broadcast_to(given, sides)
        extra = [(0, 0)] * 4
        if given.shape[2] != 1:
            extra[2] = (0, layout.rows - length)
        if given.shape[3] != 1 and layout.sliding:
            extra[3] = (layout.before, layout.rows - length + layout.after)
        return ops.pad(given, extra, constant_values=False)

    def _attention_mask_of(self, group, block):
        """Boolean `(g, 1, R, C)` for the queries and keys of a block; `R` and `C` may be 1."""
        given = self.attention_mask
        if given is None:
            return None
        starts, sides = [0, 0, 0, 0], list(ops.shape(given))
        if given.shape[2] != 1:
            starts[2], sides[2] = block.start, self.layout.block_size
        if given.shape[3] != 1:
            starts[3], sides[3] = block.first_key, block.span.width
        batch, heads, _ = self.sides
        if head_by_head():
            starts[0] = ops.minimum(group // heads, sides[0] - 1)
            starts[1] = ops.minimum(group % heads, sides[1] - 1)
            return ops.slice(given, starts, (1, 1, *sides[2:]))
        part = ops.broadcast_to(ops.slice(given, starts, sides), (batch, heads, *sides[2:]))
        return ops.reshape(part, (batch * heads, 1, *sides[2:]))


def _for_each_group(function, tensors, shapes):
    """Tuple of results of `function(group, *tensors)` for every head, or for all of them at once.

    Args:
        function: Function of the number of a group and its tensors `(g, ...)`.
        tensors: Tensors `(B * H, ...)`.
        shapes: Shapes of its results without the axis of the group.
    """
    if not head_by_head():
        return function(0, *tensors)

    def step(_, group):
        return (), function(group, *(tensor[group][None] for tensor in tensors))

    _, found = _scan(step, (), ops.shape(tensors[0])[0], shapes, tensors[0].dtype, axis=0)
    return tuple(found)


def _scan(body, carry, count, shapes, dtype, axis=1):
    """The last carry, and the outputs of all steps joined along `axis`.

    Unlike in `keras.ops.scan` on TensorFlow, outputs need not be what is carried.

    Args:
        body: Function of the carry and the number of the step that returns a new carry and a tuple
            of tensors.
        carry: Nest of tensors.
        count: Number of steps.
        shapes: Shapes of the outputs of a step without the axis of the group.
        dtype: Their dtype.
        axis: Axis of the outputs, 0 or 1.
    """
    if isinstance(count, int) and count == 1:
        carry, found = body(carry, 0)
        return carry, list(found)
    if keras.backend.backend() == "tensorflow":
        carry, found = _tensorflow_scan(body, carry, count, shapes, dtype)
    else:
        carry, found = ops.scan(body, carry, ops.arange(count, dtype="int32"))
    return carry, [_joined(part, axis) for part in found]


def _tensorflow_scan(body, carry, count, shapes, dtype):
    import tensorflow as tf

    def step(index, carry, arrays):
        carry, found = body(carry, index)
        return index + 1, carry, [a.write(index, o) for a, o in zip(arrays, found, strict=True)]

    arrays = [tf.TensorArray(dtype, size=count, element_shape=(1, *shape)) for shape in shapes]
    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < count, step, (0, carry, arrays), parallel_iterations=1
    )
    return carry, [array.stack() for array in arrays]


def _joined(output, axis):
    """Outputs of all steps, `(steps, g, rows, f)`, side by side: along the groups or the rows."""
    steps, groups, rows, features = ops.shape(output)
    if axis == 0:
        return ops.reshape(output, (steps * groups, rows, features))
    output = ops.transpose(output, (1, 0, 2, 3))
    return ops.reshape(output, (groups, steps * rows, features))


def _concatenate(parts):
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=1)


def _product(a, b, transpose_a=False, transpose_b=False):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # A transposition of its own would be a pass over the scores.
        return tf.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    return ops.matmul(a, ops.swapaxes(b, -1, -2) if transpose_b else b)


def _dropped(dropout):
    """How many out of `2**16` weights are dropped."""
    return min(round(dropout * 2**16), 2**16 - 1)
