"""Multi-head self-attention by cosines, with a proven Lipschitz constant."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_positive
from keras_lipattn.bounds.cosine import (
    certified_cosine_bound,
    cosine_layer_bound,
    cosine_matrices,
    fold,
    visible_mass,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers.self_attention import SelfAttention


class Folded(NamedTuple):
    """The kernels of a layer under `spectral_norm`.

    Attributes:
        projection: The three projections as one matrix `(D, H*(2*k+v))`.
        query: By heads, `(H, D, k)`.
        key: By heads, `(H, D, k)`.
        value: By heads, `(H, D, v)`.
        output: By heads, `(H, v, O)`.
    """

    projection: Any
    query: Any
    key: Any
    value: Any
    output: Any


@keras.saving.register_keras_serializable(package="keras_lipattn")
class ScaledCosineAttention(SelfAttention):
    """Multi-head self-attention by cosines: separate queries and keys, and a Lipschitz constant.

    With tokens `X` of shape `(T, D)`, head `h` projects queries, keys and values, each with a
    kernel and a bias of its own, and divides every one of them by its length:

    ```
    z^     = z / sqrt(|z|^2 + epsilon)
    P_ij   = softmax_j(temperature * q^_i . k^_j)
    output = sum_h P_h V^_h W_O,h + bias
    ```

    Queries, keys and values lie in the unit ball, whatever the input: the layer is Lipschitz on all
    of space, where dot-product attention is so on bounded sets only. `lipschitz()` returns the
    certified constant (Theorem 7.3). It is proportional to `1 / sqrt(epsilon)`, and about to
    `temperature`: an `epsilon` far below the squared lengths makes it large, one far above them
    turns attention into an average. Multiplying `epsilon` and all squared kernels of
    the projections by one number changes nothing.

    **Masks.** The diagonal is always visible: whatever the masks say, a token attends to itself. A
    token is padded when any of `query_mask`, `value_mask`, `key_mask` or the Keras mask of the
    input says so: no token sees it (not even a NaN in it) and its output row is zero. The
    certificate is for a fixed mask.

    Args:
        num_heads: Number of attention heads.
        key_dim: Size of each head for query and key.
        value_dim: Size of each head for value; `key_dim` by default.
        temperature: Factor of the cosines, a fixed positive number. Weights in a row differ by a
            factor of at most `exp(2 * temperature)`.
        epsilon: The positive number under the roots.
        dropout: Dropout probability of attention weights, in training.
        use_bias: Whether query, key, value and output have biases.
        output_shape: Shape of an output token, an integer or a tuple; the input's by default.
        attention_axes: Axes over which attention is applied; all but batch and features by
            default. Several axes are flattened row-major into one sequence.
        sliding_window: If set to `w`, a query sees tokens less than `w` positions away. The bound
            does not depend on the sequence length then.
        spectral_norm: If set to `c`, caps the operator norms of the four kernels, as the matrices
            `(D, H*key_dim)` (twice), `(D, H*value_dim)` and `(H*value_dim, output)`.
        lipschitz_bound: If set to `L`, caps the constant of the whole layer in `lipschitz_norm` by
            scaling its output (before the bias) by `min(1, L / bound)`. Not together with
            `spectral_norm`.
        lipschitz_norm: Norm of `lipschitz_bound`: `"l2"` (2-norm of all entries), `"token"`
            (largest 2-norm of a token) or `"linf"` (largest absolute entry).
        max_sequence_length: Number of tokens `lipschitz_bound` is for. The static length seen in
            `build` by default. A longer input is an error, or NaN rows where its length is not
            known before running.
        kernel_initializer: Initializer of the four kernels, as the matrices above.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the four kernels.
        bias_regularizer: Regularizer of the biases.
        activity_regularizer: Regularizer of the layer's output.
        kernel_constraint: Constraint of the four kernels.
        bias_constraint: Constraint of the biases.
        seed: Seed of the dropout.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Caps only ever shrink, and gradients flow through them. In training they use running norms,
    which follow the weights without guarantee; at inference they hold for whatever weights are
    loaded. They are the same for every length of the input up to `max_sequence_length`.

    Call arguments:
        query: Tensor `(B, ..., T, D)`.
        value: Omitted, or `query` itself.
        key: Omitted, or `query` itself.
        query_mask: Boolean `(B, T)`, false where a token is padding.
        value_mask: The same.
        key_mask: The same.
        attention_mask: Mask `(T, T)`, `(B, T, T)` or `(B, H, T, T)` of any dtype, nonzero where a
            query (row) may see a key (column). Any side may be 1 and broadcasts: `(B, 1, T)` hides
            keys from every query but their own. The diagonal always counts as true. With more axes
            the shape is that of `keras.layers.MultiHeadAttention`: the first axes of the attention
            weights, then those of queries and of keys, in the order of `attention_axes`. With
            several attention axes a mask `(T, T)` or `(B, T, T)` is of the flattened tokens.
        return_attention_scores: Whether to return the attention weights too.
        training: Whether to run in training mode (dropout, running norms).
        use_causal_mask: Whether a token sees only itself and those before it.

    Returns:
        Tensor `(B, ..., T, D_out)`; with `return_attention_scores` also the weights `(B, H, T, T)`.
        With more axes their shape is that of `keras.layers.MultiHeadAttention`: batch, axes without
        attention, heads, axes of the queries, axes of the keys.

    Raises:
        ValueError: For `value` or `key` other than the query, arguments out of range, both caps at
            once, masks which do not fit, `lipschitz_bound` with an unknown length, or an input
            longer than the length `lipschitz_bound` is for.

    Example:

    >>> layer = ScaledCosineAttention(num_heads=4, key_dim=16, lipschitz_bound=1.0)
    >>> x = keras.random.normal((2, 10, 64))
    >>> keras.ops.shape(layer(x))
    (2, 10, 64)
    >>> layer.lipschitz().value <= 1.0
    True

    Reference:
        Qi, Wang, Chen, Shi, Zhang, "LipsFormer: introducing Lipschitz continuity to vision
        Transformers", ICLR 2023 (the attention); docs/theory.md, Section 7 (the bound).
    """

    def __init__(self, num_heads, key_dim, value_dim=None, temperature=4.0, epsilon=1.0, **kwargs):
        require_positive("temperature", temperature, optional=False)
        require_positive("epsilon", epsilon, optional=False)
        super().__init__(num_heads, key_dim, value_dim, **kwargs)
        if self.spectral_norm is not None and self.lipschitz_bound is not None:
            # Norms of a graph exceed the exact ones a little. Shrinking the kernels by a little
            # more could then let the whole layer be shrunk by less.
            raise ValueError(
                "`spectral_norm` and `lipschitz_bound` are two ways to cap: give one. Received: "
                f"spectral_norm={self.spectral_norm}, lipschitz_bound={self.lipschitz_bound}"
            )
        self.temperature = temperature
        self.epsilon = epsilon

    def add_kernels(self):
        heads, key_dim, value_dim = self.num_heads, self.key_dim, self.value_dim
        for name, size in (("query", key_dim), ("key", key_dim), ("value", value_dim)):
            self.add_attention_kernel(f"{name}_kernel", (self.features, heads, size))
            setattr(self, f"{name}_bias", self.add_bias(f"{name}_bias", (heads, size)))
        self.add_attention_kernel("output_kernel", (heads, value_dim, *self.output_token), 2)

    def fold(self, kernels, factors, xp):
        if self.spectral_norm is not None:
            kernels = [
                self._rounded(kernel * factor, xp)
                for kernel, factor in zip(kernels, factors, strict=True)
            ]
        *projections, output = kernels
        projections = [xp.transpose(kernel, (1, 0, 2)) for kernel in projections]
        joint = xp.transpose(xp.concatenate(projections, axis=2), (1, 0, 2))
        projection = xp.reshape(joint, (self.features, -1))
        query, key, value = projections
        output = xp.reshape(output, (self.num_heads, self.value_dim, -1))
        return Folded(projection, query, key, value, output)

    def matrices(self, weights, norm, xp):
        return cosine_matrices(*self._slopes(weights, xp), weights.output, norm, xp)

    def bound(self, weights, norms, norm, tokens, mask, xp):
        mass = 1.0
        if norm == "l2":
            mass = visible_mass(self.temperature, tokens, mask.mask, mask.n_queries)
        a, g = self._slopes(weights, xp)
        return cosine_layer_bound(a, g, weights.output, norm=norm, mass=mass, norms=norms, xp=xp)

    def _slopes(self, weights, xp):
        """`A` and `G` of Theorem 7.3."""
        projections = weights.query, weights.key, weights.value
        return fold(*projections, temperature=self.temperature, epsilon=self.epsilon, xp=xp)

    def _num_summands(self):
        return self.features + self.key_dim + 2 * self.value_dim + self.num_heads

    def certified(self, norm, mask, tokens, cap_mask):
        reason = self.bias_reason()
        if reason:
            return LipschitzBound(
                value=np.inf, norm=norm, kind="certified", theorem="", reason=reason
            )
        weights = self.host_weights().weights(cap_mask)
        weights = weights._replace(
            **{name: array.astype(np.float64) for name, array in weights._asdict().items()}
        )
        return certified_cosine_bound(
            *self._slopes(weights, np),
            weights.output,
            norm=norm,
            temperature=self.temperature,
            tokens=tokens,
            mask=mask.mask,
            n_queries=mask.n_queries,
        )

    def attend(self, tokens, weights, mask, training, return_scores):
        projected = ops.matmul(tokens, weights.projection)
        if self.use_bias:
            biases = [self.query_bias, self.key_bias, self.value_bias]
            biases = [ops.cast(bias, self.compute_dtype) for bias in biases]
            projected = projected + ops.reshape(ops.concatenate(biases, axis=1), (-1,))
        # Not of `projected`: tf2onnx gets the shape of a product wrong.
        batch, length, _ = ops.shape(tokens)
        key_dim = self.key_dim
        # The batch is spelled out: an empty tensor leaves no size to infer.
        shape = (batch, length, self.num_heads, 2 * key_dim + self.value_dim)
        heads = ops.transpose(ops.reshape(projected, shape), (0, 2, 1, 3))
        heads = ops.cast(heads, self._norm_dtype)
        query, key, value = (
            _normalized(part, self.epsilon)
            for part in (
                heads[..., :key_dim],
                heads[..., key_dim : 2 * key_dim],
                heads[..., 2 * key_dim :],
            )
        )
        scores = ops.matmul(self.temperature * query, ops.swapaxes(key, -1, -2))
        attention = ops.cast(mask.softmax(scores), self.compute_dtype)
        kept = attention
        if training and self.dropout > 0.0:
            kept = keras.random.dropout(attention, self.dropout, seed=self._seed_generator)
        mixed = ops.matmul(kept, ops.cast(value, self.compute_dtype))
        mixed = ops.transpose(mixed, (0, 2, 1, 3))
        mixed = ops.reshape(mixed, (batch, length, self.num_heads * self.value_dim))
        return mixed, None, attention

    def get_config(self):
        return {
            **super().get_config(),
            "temperature": self.temperature,
            "epsilon": self.epsilon,
        }


def _normalized(z, epsilon):
    """`z / sqrt(|z|^2 + epsilon)` along the last axis: inside the unit ball, smooth everywhere."""
    return z * ops.rsqrt(ops.sum(ops.square(z), axis=-1, keepdims=True) + epsilon)
