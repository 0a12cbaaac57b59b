"""Attention by cosine: `softmax_j(tau q^_i . k^_j)` with `z^ = z / sqrt(|z|^2 + epsilon)`."""

from keras import ops

from keras_lipattn.layers._distance_attention import masked_softmax


def normalized(z, epsilon):
    """`z / sqrt(|z|^2 + epsilon)` along the last axis: inside the unit ball, smooth everywhere."""
    return z * ops.rsqrt(ops.sum(ops.square(z), axis=-1, keepdims=True) + epsilon)


def cosine_weights(queries, keys, temperature, mask):
    """The matrix `softmax_j(tau q^_i . k^_j)`, `(B, H, T, T)`.

    Args:
        queries: Normalised queries `(B, H, T, k)`.
        keys: Normalised keys `(B, H, T, k)`.
        temperature: `tau`.
        mask: A `Mask`.
    """
    scores = ops.matmul(temperature * queries, ops.swapaxes(keys, -1, -2))
    positions = ops.arange(ops.shape(queries)[2], dtype="int32")
    visible = mask.visible(positions, positions, mask.attention_mask)
    if mask.valid is not None:
        keys_seen = mask.valid[:, None, None, :]
        visible = keys_seen if visible is None else ops.logical_and(visible, keys_seen)
    # A row of a padded token may see nothing: it is uniform then, and set to zero later.
    return masked_softmax(scores, visible)
