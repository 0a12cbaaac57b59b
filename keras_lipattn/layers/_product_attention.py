"""Dot-product attention of projected heads, with rows that see no key defined as zero."""

import keras
from keras import ops

from keras_lipattn.layers._fused_attention import must_be_plain
from keras_lipattn.layers._masks import masked_softmax


def attend_by_product(
    query, key, value, mask, *, dropout, seed, training, return_scores, flash_attention, dtype
):
    """`softmax_j(q_i . k_j / sqrt(k) + b_ij) v` of every head.

    Args:
        query: Tensor `(B, H, T, k)` of the compute dtype.
        key: Tensor `(B, G, S, k)`; each of its heads serves `H / G` query heads in a row.
        value: Tensor `(B, G, S, v)`.
        mask: `Mask` of the call.
        dropout: Probability that an attention weight is dropped.
        seed: Seed generator of the dropout.
        training: Whether a gradient step will be taken.
        return_scores: Whether the attention weights are needed.
        flash_attention: Argument of `keras.ops.dot_product_attention`.
        dtype: The compute dtype.

    Returns:
        Heads `(B, T, H*v)`, and the attention weights `(B, H, T, S)`, or `None`.
    """
    plain = dropout or return_scores or mask.relative_bias is not None or must_be_plain()
    backend = keras.backend.backend()
    # The function of JAX takes heads of one size only.
    fits = backend == "torch" or (backend == "jax" and query.shape[-1] == value.shape[-1])
    if fits and not plain:
        return _by_backend(query, key, value, mask, flash_attention), None
    groups = query.shape[1] // key.shape[1]
    key, value = (_repeated(part, groups) for part in (key, value))
    biases = None
    if mask.relative_bias is not None:
        places = (ops.arange(ops.shape(part)[2], dtype="int32") for part in (query, key))
        biases = mask.relative_bias.at(*places)
    accurate = dtype in ("float32", "float64")
    if training and accurate and not (dropout or return_scores):
        return joined(_attend(query, key, value, biases, mask, dtype)), None
    scores = product_scores(query, key, dtype)
    if biases is not None:
        scores = scores + biases
    weights = kept = ops.cast(mask.softmax(scores), dtype)
    if dropout:
        kept = keras.random.dropout(weights, dropout, seed=seed)
    return joined(ops.matmul(kept, value)), weights


def _attend(query, key, value, biases, mask, dtype):
    """Heads `(B, H, T, v)`, with the derivative written out on TensorFlow.

    Two of the passes over the scores that differentiating softmax takes are not needed.
    """
    scale = query.shape[-1] ** -0.5

    def weighted(query, key, biases):
        scores = product_scores(query, key, dtype)
        return mask.softmax(scores if biases is None else scores + biases)

    if keras.backend.backend() != "tensorflow" or must_be_plain():
        return ops.matmul(weighted(query, key, biases), value)

    @ops.custom_gradient
    def mix(query, key, value, *biases):
        weights = weighted(query, key, biases[0] if biases else None)
        output = ops.matmul(weights, value)

        def gradient(upstream):
            shared = ops.sum(upstream * output, axis=-1, keepdims=True)
            above = ops.concatenate([upstream, -shared], axis=-1)
            values = ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)
            # Derivative of the scores; zero where a pair is hidden.
            slope = weights * ops.matmul(above, ops.swapaxes(values, -1, -2))
            of_query = ops.matmul(slope, scale * key)
            of_key = ops.matmul(ops.swapaxes(slope, -1, -2), scale * query)
            of_value = ops.matmul(ops.swapaxes(weights, -1, -2), upstream)
            if not biases:
                return of_query, of_key, of_value
            return of_query, of_key, of_value, ops.sum(slope, axis=0)

        return output, gradient

    return mix(query, key, value) if biases is None else mix(query, key, value, biases)


def decode_by_product(query, key, value, position, mask, dtype):
    """Heads `(B, S, H*v)` of new queries over keys and values of a cache.

    Args:
        query: Tensor `(B, H, S, k)`, of the new tokens.
        key: Tensor `(B, G, T, k)`, the new tokens among them.
        value: Tensor `(B, G, T, v)`.
        position: Position of the first new token, an integer tensor.
        mask: `Mask` of the call, causal.
        dtype: The compute dtype.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (_repeated(part, groups) for part in (key, value))
    rows = position + ops.arange(ops.shape(query)[2], dtype="int32")
    columns = ops.arange(ops.shape(key)[2], dtype="int32")
    scores = product_scores(query, key, dtype)
    if mask.relative_bias is not None:
        scores = scores + mask.relative_bias.at(rows, columns)
    weights = masked_softmax(scores, mask.visible(rows, columns, None))
    return joined(ops.matmul(ops.cast(weights, dtype), value))


def product_scores(query, key, dtype):
    """`q_i . k_j / sqrt(k)`, `(B, H, T, S)`, in at least float32."""
    norm_dtype = "float64" if dtype == "float64" else "float32"
    query = ops.cast(query, norm_dtype) * (query.shape[-1] ** -0.5)
    return ops.matmul(query, ops.swapaxes(ops.cast(key, norm_dtype), -1, -2))


def affine(tokens, kernel, bias):
    """`tokens @ kernel + bias` for tokens `(B, T, D)`; no bias if `None`."""
    if bias is None:
        return ops.matmul(tokens, kernel)
    batch, length, width = ops.shape(tokens)
    # As matrices: TensorFlow adds the bias inside of the product then.
    flat = ops.reshape(tokens, (batch * length, width))
    return ops.reshape(ops.matmul(flat, kernel) + bias, (batch, length, kernel.shape[-1]))


def joined(heads):
    """`(B, H, T, v)` as `(B, T, H*v)`."""
    batch, num_heads, length, size = ops.shape(heads)
    return ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), (batch, length, num_heads * size))


def _repeated(heads, groups):
    return heads if groups == 1 else ops.repeat(heads, groups, axis=1)


def _by_backend(query, key, value, mask, flash_attention):
    """The backend's own function, fused where it has a kernel."""
    query, key, value = (ops.transpose(part, (0, 2, 1, 3)) for part in (query, key, value))
    batch, length, num_heads, _ = ops.shape(query)
    causal = mask.use_causal_mask and mask.sliding_window is None and not mask.is_cross
    causal = causal and mask.attention_mask is None and mask.valid is None
    visible = None if causal else mask.visible_keys(length, ops.shape(key)[1])
    sees = None
    if visible is not None:
        visible = ops.reshape(visible, (*[1] * (4 - len(visible.shape)), *ops.shape(visible)))
        sees = ops.any(visible, axis=-1, keepdims=True)
        # A row without keys is NaN in some kernels: it sees all of them, and is set to zero after.
        visible = ops.logical_or(visible, ops.logical_not(sees))
        visible = ops.broadcast_to(visible, (batch, visible.shape[1], length, ops.shape(key)[1]))
    heads = ops.dot_product_attention(
        query, key, value, mask=visible, is_causal=causal, flash_attention=flash_attention
    )
    if sees is not None:
        heads = ops.where(ops.transpose(sees, (0, 2, 1, 3)), heads, ops.zeros_like(heads))
    return ops.reshape(heads, (batch, length, num_heads * heads.shape[-1]))
