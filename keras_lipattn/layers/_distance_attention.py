"""Attention by distance: `softmax_j(-|y_i - y_j|^2)` applied to the projected tokens themselves."""

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lipattn.layers._blocked_attention import attend_in_blocks, block_size_for
from keras_lipattn.layers._visibility import HIDDEN, visible_pairs

# From this length on the full matrix of weights is not formed: below, blocks only cost time.
BLOCKED_FROM = 4096


@dataclass(frozen=True)
class Mask:
    """Who sees whom in one call.

    Attributes:
        valid: Boolean `(B, T)`, false where a token is padding, or `None`.
        attention_mask: Boolean, broadcastable to `(B, H, T, T)`, or `None`.
        use_causal_mask: Whether later tokens are hidden.
        sliding_window: `None`, or the distance from which on tokens are hidden.
        log_weights: Logarithms of the weights of the tokens, `(B, T)`, or `None`.
        relative_bias: `RelativeBias` of the scores, or `None`.
    """

    valid: Any = None
    attention_mask: Any = None
    use_causal_mask: bool = False
    sliding_window: int | None = None
    log_weights: Any = None
    relative_bias: Any = None

    @property
    def all_see_all(self):
        """Whether all valid tokens see each other."""
        return (
            self.attention_mask is None and not self.use_causal_mask and self.sliding_window is None
        )

    def visible(self, rows, columns, attention_mask):
        """Visible pairs of some rows, whose part of the attention mask is given; `None` if all."""
        return visible_pairs(
            rows,
            columns,
            attention_mask=attention_mask,
            use_causal_mask=self.use_causal_mask,
            sliding_window=self.sliding_window,
        )


def score_queries(y):
    """Queries `(B, H, R, k + 1)` for the keys of `score_keys`."""
    return ops.concatenate([2.0 * y, ops.ones_like(y[..., :1])], axis=-1)


def score_keys(y, mask):
    """Keys `(B, H, T, k + 1)` whose product with a query is `-|y_i - y_j|^2` up to a term in `i`.

    What depends on the key alone rides along as one more feature: no pass over the scores is spent
    on it.

    Args:
        y: Tensor `(B, H, T, k)`, float32 or float64, near the origin: far from it the expansion of
            the square loses digits.
        mask: The `Mask` of the call.
    """
    return ops.concatenate([y, ops.expand_dims(_key_bias(_squares(y), mask), -1)], axis=-1)


def _scores(rows, y, mask):
    """Scores `(B, H, R, T)` of the queries `rows` over keys `y`: softmax ignores terms in `i`."""
    if not _adding_is_cheaper(rows, y):
        return ops.matmul(score_queries(rows), ops.swapaxes(score_keys(y, mask), -1, -2))
    # With the heads in the batch, TensorFlow's kernels take the factor and what is added into the
    # product: no pass over the scores is spent on either.
    batch, heads, queries, key_dim = ops.shape(rows)
    keys = ops.shape(y)[2]
    columns = ops.reshape(ops.swapaxes(y, -1, -2), (batch * heads, 1, key_dim, keys))
    rows = ops.reshape(rows, (batch * heads, 1, queries, key_dim))
    bias = ops.reshape(_key_bias(_squares(y), mask), (batch * heads, 1, 1, keys))
    scores = ops.matmul(2.0 * rows, columns) + bias
    return ops.reshape(scores, (batch, heads, queries, keys))


def _adding_is_cheaper(rows, y):
    """Whether a pass over the scores costs less than copies of queries and keys with a feature."""
    queries, keys, key_dim = rows.shape[2], y.shape[2], y.shape[3]
    if queries is None or keys is None:
        return False
    return queries * keys <= 2 * (queries + keys) * key_dim


def _squares(y):
    return ops.sum(ops.square(y), axis=-1)


def _key_bias(squares, mask):
    """What depends on the key alone, `(B, H, T)`: `-|y_j|^2`, or the hiding of a padded one."""
    bias = -squares
    if mask.log_weights is not None:
        bias = bias + ops.expand_dims(mask.log_weights, 1)
    if mask.valid is None:
        return bias
    return ops.where(ops.expand_dims(mask.valid, 1), bias, HIDDEN)


def attention_weights(y, mask, biases=None):
    """The full matrix `softmax_j(-|y_i - y_j|^2 + b_ij)`, `(B, H, T, T)`.

    Args:
        y: Tensor `(B, H, T, k)`, as `score_keys` takes it.
        mask: The `Mask` of the call.
        biases: Tensor `(H, T, T)`; what the mask has of its own by default.
    """
    if biases is None:
        biases = biases_of_pairs(y, mask)
    visible = None
    if not mask.all_see_all:
        positions = ops.arange(ops.shape(y)[2], dtype="int32")
        visible = mask.visible(positions, positions, mask.attention_mask)
    scores = _scores(y, y, mask)
    return masked_softmax(scores if biases is None else scores + biases, visible)


def biases_of_pairs(y, mask):
    """Relative biases of all pairs, `(H, T, T)`, or `None`."""
    if mask.relative_bias is None:
        return None
    positions = ops.arange(ops.shape(y)[2], dtype="int32")
    return mask.relative_bias.at(positions, positions)


def mixed(y, mask):
    """`softmax_j(-|y_i - y_j|^2 + b_ij) y`, `(B, H, T, k)`.

    On TensorFlow the derivative is written out: three of the passes over the `T * T` entries that
    differentiating softmax and both products takes are not needed. Elsewhere the compiler finds
    them, and forward mode must go through. Weights of tokens have a derivative too: not this one.
    """
    biases = biases_of_pairs(y, mask)
    if keras.backend.backend() != "tensorflow" or mask.log_weights is not None:
        return ops.matmul(attention_weights(y, mask, biases), y)

    @ops.custom_gradient
    def mix(y, *biases):
        weights = attention_weights(y, mask, *biases)
        output = ops.matmul(weights, y)

        def gradient(upstream):
            shared = ops.sum(upstream * output, axis=-1, keepdims=True)
            above = ops.concatenate([upstream, -shared], axis=-1)
            values = ops.concatenate([y, ops.ones_like(shared)], axis=-1)
            # Derivative of the scores 2 y_i.y_j - |y_j|^2; zero where a pair is hidden.
            slope = weights * ops.matmul(above, ops.swapaxes(values, -1, -2))
            of_keys = ops.expand_dims(ops.sum(slope, axis=-2), -1) * y
            of_pairs = ops.matmul(slope, y) + ops.matmul(ops.swapaxes(slope, -1, -2), y)
            of_values = ops.matmul(ops.swapaxes(weights, -1, -2), upstream)
            of_y = 2.0 * (of_pairs - of_keys) + of_values
            return (of_y, ops.sum(slope, axis=0)) if biases else of_y

        return output, gradient

    return mix(y) if biases is None else mix(y, biases)


def causal_weights(y, rows, first, mask):
    """Weights `(B, H, R, T)` of the queries `rows`, at positions from `first` on, over keys `y`."""
    positions = first + ops.arange(rows.shape[2], dtype="int32")
    columns = ops.arange(y.shape[2], dtype="int32")
    scores = _scores(rows, y, mask)
    if mask.relative_bias is not None:
        scores = scores + mask.relative_bias.at(positions, columns)
    return masked_softmax(scores, mask.visible(positions, columns, None))


def masked_softmax(scores, visible):
    """Softmax over the last axis, of a single entry too, where `visible`, or everywhere."""
    if visible is not None:
        scores = ops.where(visible, scores, HIDDEN)
    if scores.shape[-1] == 1:
        # Keras warns of a softmax over a single entry.
        return ops.ones_like(scores)
    return ops.softmax(scores, axis=-1)


def mixed_in_blocks(y, mask):
    """What `mixed` is, with memory linear in the length, which must be static."""
    batch, heads, length, _ = y.shape
    block_size = block_size_for(batch, heads, length)
    columns = ops.arange(length, dtype="int32")
    padded = -(-length // block_size) * block_size
    attention_mask = mask.attention_mask
    # One row for all queries is not cut into blocks.
    has_rows = attention_mask is not None and attention_mask.shape[2] != 1
    if attention_mask is not None and has_rows:
        batch_side, head_side, _, key_side = ops.shape(attention_mask)
        if attention_mask.shape[2] is None:
            sides = (batch_side, head_side, length, key_side)
            attention_mask = ops.broadcast_to(attention_mask, sides)
        extra = ((0, 0), (0, 0), (0, padded - length), (0, 0))
        attention_mask = ops.pad(attention_mask, extra, constant_values=False)

    def hide(scores, start):
        rows = start + ops.arange(block_size, dtype="int32")
        part = attention_mask
        if has_rows:
            sides = (batch_side, head_side, block_size, key_side)
            part = ops.slice(attention_mask, (0, 0, start, 0), sides)
        visible = mask.visible(rows, columns, part)
        return scores if visible is None else ops.where(visible, scores, HIDDEN)

    return attend_in_blocks(
        score_queries(y),
        score_keys(y, mask),
        y,
        hide=hide,
        block_size=block_size,
        relative_bias=mask.relative_bias,
    )
