"""Attention by distance: `softmax_j(-|y_i - y_j|^2)` applied to the projected tokens themselves."""

from typing import Any

import keras
from keras import ops

from keras_lipattn.layers._blocked_attention import attend_in_blocks
from keras_lipattn.layers._fused_attention import (
    fused_attention,
    handwritten_gradient_suffices,
    use_fused_kernel,
)
from keras_lipattn.layers._masks import HIDDEN, masked_softmax

# From this length on the full matrix of weights is not formed. Below it, blocks are slower where
# TensorFlow has several threads. With narrow windows they are faster from half this length on.
BLOCKWISE_MIN_LENGTH = 2048 if keras.backend.backend() == "tensorflow" else 4096


def attend_by_distance(
    tokens,
    kernel,
    mask,
    *,
    num_heads,
    dropout,
    seed,
    training,
    return_scores,
    flash_attention,
    dtype,
) -> tuple[Any, Any, Any]:
    """`softmax_j(-|y_i - y_j|^2) y` for the projected tokens `y` of every head.

    Args:
        tokens: Tensor `(B, T, D)`, zero where padded.
        kernel: Tensor `(D, H*K)` of the compute dtype.
        mask: `Mask` of the call.
        num_heads: Number of heads `H`.
        dropout: Probability that an attention weight is dropped.
        seed: Seed generator of the dropout.
        training: Whether a gradient step will be taken.
        return_scores: Whether the attention weights are needed.
        flash_attention: Argument of the layer; see `use_fused_kernel`.
        dtype: The compute dtype.

    Returns:
        Heads `(B, T, H*K)`; what to add to those of every token, `(B, 1, H*K)`, or `None` if it was
        added; the attention weights `(B, H, T, T)`, or `None`.
    """
    norm_dtype = "float64" if dtype == "float64" else "float32"
    # Distances do not change under a shift, their expansion loses digits far from the origin.
    x = ops.cast(tokens, norm_dtype)
    center = ops.stop_gradient(_center(x, mask))
    near = _split_heads(ops.matmul(ops.cast(x - center, dtype), kernel), num_heads, x)
    shift = ops.matmul(ops.cast(center, dtype), kernel)
    y = ops.cast(near, norm_dtype)
    # Of rows with dropped weights, which no longer sum to one: the center is weighted like tokens.
    values = near + _split_heads(shift, num_heads, center) if dropout else None
    if not return_scores:
        # The kernels of backends support neither biases nor weights of tokens.
        plain = not dropout and mask.relative_bias is None and mask.log_weights is None
        if plain and use_fused_kernel(y, dtype, flash_attention):
            return _join_heads(fused_attention(y, mask, dtype)), shift, None
        if _use_blocks(tokens.shape[1], mask.sliding_window, dropout):
            if not dropout:
                return _join_heads(ops.cast(attend_blockwise(y, mask), dtype)), shift, None
            values = ops.cast(values, norm_dtype)
            heads = attend_blockwise(y, mask, values, dropout=dropout, seed=seed.next())
            return _join_heads(ops.cast(heads, dtype)), None, None
        # Only where a step will be taken: a served graph stays one of plain operations.
        if training and not dropout and dtype == norm_dtype:
            return _join_heads(attend(y, mask)), shift, None
    weights = ops.cast(attention_weights(y, mask), dtype)
    if not dropout:
        return _join_heads(ops.matmul(weights, near)), shift, weights
    kept = keras.random.dropout(weights, dropout, seed=seed)
    return _join_heads(ops.matmul(kept, values)), None, weights


def _use_blocks(length, sliding_window, dropout):
    """Whether sequences of `length`, `None` if unknown, are attended to in blocks."""
    if length is None or not handwritten_gradient_suffices():
        return False
    is_narrow = sliding_window is not None and 8 * sliding_window <= length
    if length < (BLOCKWISE_MIN_LENGTH // 2 if is_narrow else BLOCKWISE_MIN_LENGTH):
        return False
    # The backward pass draws the numbers of the forward pass again.
    return not dropout or keras.backend.backend() == "tensorflow"


def attend_across(
    queries, keys, values, kernel, mask, *, num_heads, dropout, seed, dtype
) -> tuple[Any, Any, Any]:
    """`softmax_j(-|y_i - y'_j|^2) y''` for projected queries `y`, keys `y'` and values `y''`.

    Args:
        queries: Tensor `(B, T, D)`, in a ball: distances are expanded about the origin.
        keys: Tensor `(B, S, D)`.
        values: Tensor `(B, S, D)`, or `keys`.
        kernel: Tensor `(D, H*K)` of the compute dtype.
        mask: `Mask` of the call.
        num_heads: Number of heads `H`.
        dropout: Probability that an attention weight is dropped.
        seed: Seed generator of the dropout.
        dtype: The compute dtype.

    Returns:
        What `attend_by_distance` returns, with attention weights `(B, H, T, S)`.
    """
    norm_dtype = "float64" if dtype == "float64" else "float32"
    rows, columns, mixed = (
        _split_heads(ops.matmul(tokens, kernel), num_heads, tokens)
        for tokens in (queries, keys, values)
    )
    y, z = ops.cast(rows, norm_dtype), ops.cast(columns, norm_dtype)
    scores = ops.matmul(2.0 * y, ops.swapaxes(z, -1, -2)) - ops.expand_dims(_squares(z), -2)
    if mask.relative_bias is not None:
        places = (ops.arange(ops.shape(part)[2], dtype="int32") for part in (y, z))
        scores = scores + mask.relative_bias.at(*places)
    weights = kept = ops.cast(mask.softmax(scores), dtype)
    if dropout:
        kept = keras.random.dropout(weights, dropout, seed=seed)
    return _join_heads(ops.matmul(kept, mixed)), None, weights


def decode_by_distance(new, cache, position, mask, num_heads):
    """Heads `(B, S, H*K)` of new tokens over those of a cache.

    Args:
        new: Projected new tokens `(B, S, H*K)`.
        cache: Projected tokens `(B, T, H*K)`, the new ones among them.
        position: Position of the first new token, an integer tensor.
        mask: `Mask` of the call, causal.
        num_heads: Number of heads.
    """
    dtype = keras.backend.standardize_dtype(cache.dtype)
    norm_dtype = "float64" if dtype == "float64" else "float32"
    # Every token sees the first one: the origin that the full pass takes.
    origin = ops.cast(cache[:, :1], norm_dtype)
    y = _split_heads(ops.cast(cache, norm_dtype) - origin, num_heads, cache)
    rows = _split_heads(ops.cast(new, norm_dtype) - origin, num_heads, new)
    positions = position + ops.arange(rows.shape[2], dtype="int32")
    columns = ops.arange(y.shape[2], dtype="int32")
    scores = _scores(rows, y, mask)
    if mask.relative_bias is not None:
        scores = scores + mask.relative_bias.at(positions, columns)
    weights = masked_softmax(scores, mask.visible(positions, columns, None))
    return ops.cast(_join_heads(ops.matmul(weights, y)) + origin, dtype)


def _center(x, mask):
    """A point near the tokens, `(B, 1, D)`: their mean, or the first one where some are hidden.

    With a causal mask the mean would let rounding errors depend on tokens a query may not see.
    """
    valid = mask.valid
    if not mask.hides_padding_only:
        if valid is None:
            return x[:, :1]
        first = ops.logical_and(valid, ops.equal(ops.cumsum(ops.cast(valid, "int32"), axis=1), 1))
        return ops.sum(
            ops.where(ops.expand_dims(first, -1), x, ops.zeros_like(x)), axis=1, keepdims=True
        )
    if valid is None:
        return ops.mean(x, axis=1, keepdims=True)
    count = ops.sum(ops.cast(valid, x.dtype), axis=1)[:, None, None]
    return ops.sum(x, axis=1, keepdims=True) / ops.maximum(count, 1.0)


def _join_heads(heads):
    batch, num_heads, length, size = ops.shape(heads)
    return ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), (batch, length, num_heads * size))


def _split_heads(projected, num_heads, tokens):
    # The batch is spelled out: an empty tensor leaves no size to infer. Sizes are those of
    # `tokens`, which were projected: tf2onnx gets the shape of a product wrong.
    batch, length = ops.shape(tokens)[:2]
    heads = ops.reshape(projected, (batch, length, num_heads, projected.shape[-1] // num_heads))
    return ops.transpose(heads, (0, 2, 1, 3))


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
        biases: Tensor `(H, T, T)`; those of the mask by default.
    """
    if biases is None:
        biases = _biases_of_pairs(y, mask)
    visible = mask.visible_pairs(ops.shape(y)[2])
    scores = _scores(y, y, mask)
    return masked_softmax(scores if biases is None else scores + biases, visible)


def _biases_of_pairs(y, mask):
    """Relative biases of all pairs, `(H, T, T)`, or `None`."""
    if mask.relative_bias is None:
        return None
    positions = ops.arange(ops.shape(y)[2], dtype="int32")
    return mask.relative_bias.at(positions, positions)


def attend(y, mask):
    """`softmax_j(-|y_i - y_j|^2 + b_ij) y`, `(B, H, T, k)`.

    On TensorFlow the derivative is written out: three of the passes over the `T * T` entries that
    differentiating softmax and both products takes are not needed. Elsewhere the compiler finds
    them, and forward mode must go through. Weights of tokens have a derivative too: not this one.
    """
    biases = _biases_of_pairs(y, mask)
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


def attend_blockwise(y, mask, values=None, *, dropout=0.0, seed=None):
    """`attend` with memory linear in the length, which must be static.

    Args:
        y: As `attend` takes it.
        mask: `Mask` of the call.
        values: What the weights are applied to, `(B, H, T, k)`; by default `y`.
        dropout: Probability that a weight is dropped.
        seed: Seed of the dropout.
    """
    queries, keys = score_queries(y), score_keys(y, mask)
    values = y if values is None else values
    return attend_in_blocks(queries, keys, values, mask, dropout=dropout, seed=seed)
