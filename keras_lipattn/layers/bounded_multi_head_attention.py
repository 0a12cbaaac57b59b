"""Multi-head dot-product attention on bounded tokens, with a proven Lipschitz constant."""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_positive, require_positive_integer
from keras_lipattn.bounds.bounded_products import (
    ProductLayer,
    certified_cross_bounds,
    certified_product_bound,
    product_layer_bound,
    product_matrices,
    product_scaling,
    product_terms,
    query_pull,
)
from keras_lipattn.bounds.bounded_tokens import (
    combined,
    in_entries,
)
from keras_lipattn.bounds.column_sums import column_masses
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._masks import Mask, mask_class
from keras_lipattn.layers._precision import cast_to_compute_dtype
from keras_lipattn.layers._product_attention import affine, attend_by_product, decode_by_product
from keras_lipattn.layers._relative_bias import RelativeBias
from keras_lipattn.layers.self_attention import SelfAttention
from keras_lipattn.layers.token_projection import project_tokens


class Folded(NamedTuple):
    """The kernels of a layer under `spectral_norm`; those of keys and values once for each head.

    Attributes:
        projection: The three projections as one matrix `(D, N)`; as one vector where queries, keys
            and values have different features.
        query: By heads, `(H, D, k)`.
        key: By heads, `(H, E, k)`.
        value: By heads, `(H, F, v)`.
        output: By heads, `(H, v, O)`.
    """

    projection: Any
    query: Any
    key: Any
    value: Any
    output: Any


@keras.saving.register_keras_serializable(package="keras_lipattn")
class BoundedMultiHeadAttention(SelfAttention):
    """Multi-head dot-product attention on bounded tokens: `MultiHeadAttention` with a constant.

    Every token is projected onto a ball, `x min(1, token_radius / |x|)`. What follows is the
    attention of `keras.layers.MultiHeadAttention`, with the same weights:

    ```
    P_ij   = softmax_j((x_i W_Q + b_Q) . (z_j W_K + b_K) / sqrt(key_dim))
    output = sum_h sum_j P_ij (z_j W_V + b_V) W_O + b_O
    ```

    Where tokens are inside the ball anyway, the layer is the standard one: a trained layer can be
    replaced by it without loss (`convert_attention`). Dot-product attention has no constant on all
    of space. On a ball it has one, which does not depend on the number of tokens in the token and
    max norms, nor on masks and relative positions (Theorems 7.1, 7.4 and 7.7). It grows with the
    square of the radius, times the size of the scores' kernels: small tokens make it small.

    **Different tensors.** Value and key may be other tensors than the query, with features of their
    own. `lipschitz()` is the constant of self-attention, `cross_lipschitz()` those with respect to
    each input.

    **Masks.** In self-attention a token is padded when any of `query_mask`, `value_mask`,
    `key_mask` or the Keras mask of the input says so: no token sees it and its output row is zero.
    Otherwise `query_mask` is about rows of the output, and the other two about keys. Unlike in the
    other layers of this package the diagonal is not always visible. A query that sees no key has
    attention weights of zero, so its row is the output bias alone. The certificate is for a fixed
    mask.

    Args:
        num_heads: Number of attention heads of the queries.
        key_dim: Size of each head for query and key.
        value_dim: Size of each head for value; `key_dim` by default.
        token_radius: Radius of the ball onto which tokens are projected.
        num_key_value_heads: Number of heads of keys and values, each for `num_heads /
            num_key_value_heads` heads of queries in a row; `num_heads` by default.
        dropout: Dropout probability of attention weights, in training.
        use_bias: Whether query, key, value and output have biases.
        output_shape: Shape of an output token, an integer or a tuple; the query's by default.
        attention_axes: Axes over which attention is applied; all but batch and features by
            default. Several axes are flattened row-major into one sequence.
        sliding_window: If set to `w`, a query sees tokens less than `w` positions away.
        flash_attention: Argument of `keras.ops.dot_product_attention`, on backends other than
            TensorFlow, which has no fused kernel. None takes relative positions.
        max_relative_position: If set to `R`, every head learns a bias of its scores for each
            distance from 1 to R, before and after, that starts at 0; tokens further apart share the
            last one. The biases, `relative_bias`, have no regularizer or constraint. They change no
            constant in the token and max norms.
        spectral_norm: If set to `c`, caps the operator norms of the four kernels, as matrices
            `(features, heads * size)` and `(num_heads * value_dim, output)`.
        lipschitz_bound: If set to `L`, caps the constant of the whole layer in `lipschitz_norm` by
            scaling its output (before the bias) by `min(1, L / bound)`. For other tensors as value
            and key it is the constant of all inputs side by side. Not together with
            `spectral_norm`.
        lipschitz_norm: Norm of `lipschitz_bound`: `"l2"` (2-norm of all entries), `"token"`
            (largest 2-norm of a token) or `"linf"` (largest absolute entry).
        max_sequence_length: Number of tokens (of queries, for other tensors) that
            `lipschitz_bound` is for, in the 2-norm. The static length seen in `build` by default.
            A longer input is an error, or NaN rows where its length is not known before running.
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
    loaded.

    Call arguments:
        query: Tensor `(B, ..., T, D)`.
        value: Tensor `(B, ..., S, F)`; `query` by default.
        key: Tensor `(B, ..., S, E)`; `value` by default.
        query_mask: Boolean `(B, T)`, false where a query is padding.
        value_mask: Boolean `(B, S)`, false where a value is padding.
        key_mask: Boolean `(B, S)`, false where a key is padding.
        attention_mask: Mask `(T, S)`, `(B, T, S)` or `(B, H, T, S)` of any dtype, nonzero where a
            query (row) may see a key (column). Any side may be 1 and broadcasts. With more axes the
            shape is that of `keras.layers.MultiHeadAttention`: the first axes of the attention
            weights, then those of queries and of keys, in the order of `attention_axes`.
        return_attention_scores: Whether to return the attention weights too.
        training: Whether to run in training mode (dropout, running norms).
        use_causal_mask: Whether a query sees only keys at its own position and before.

    Returns:
        Tensor `(B, ..., T, D_out)`; with `return_attention_scores` also the weights `(B, H, T, S)`.

    Raises:
        ValueError: For arguments out of range, both caps at once, tensors or masks which do not
            fit, `lipschitz_bound` in the 2-norm with an unknown length, or an input longer than the
            length it is for.

    Example:

    >>> layer = BoundedMultiHeadAttention(
    ...     num_heads=4, key_dim=16, token_radius=2.0, lipschitz_bound=1.0, lipschitz_norm="token"
    ... )
    >>> x, memory = keras.random.normal((2, 10, 64)), keras.random.normal((2, 7, 64))
    >>> keras.ops.shape(layer(x, memory))
    (2, 10, 64)
    >>> layer.lipschitz(norm="token").value <= 1.0
    True
    >>> sorted(layer.cross_lipschitz(norm="token"))
    ['query', 'value']

    Reference:
        Vaswani et al., "Attention is all you need", NeurIPS 2017 (the attention); docs/theory.md,
        Section 7 (the bounds).
    """

    _keeps_diagonal = False

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        token_radius=1.0,
        num_key_value_heads=None,
        flash_attention=None,
        max_relative_position=None,
        **kwargs,
    ):
        if kwargs.pop("use_gate", False):
            raise ValueError(
                "`use_gate` is not supported: multiplying by a gate computed from the input has no "
                "Lipschitz bound. Received: use_gate=True"
            )
        require_positive("token_radius", token_radius, optional=False)
        require_positive_integer("num_key_value_heads", num_key_value_heads, optional=True)
        require_positive_integer("max_relative_position", max_relative_position, optional=True)
        super().__init__(num_heads, key_dim, value_dim, **kwargs)
        if self.spectral_norm is not None and self.lipschitz_bound is not None:
            # As in `ScaledCosineAttention`: smaller kernels could let the layer be shrunk by less.
            raise ValueError(
                "`spectral_norm` and `lipschitz_bound` are two ways to cap: give one. Received: "
                f"spectral_norm={self.spectral_norm}, lipschitz_bound={self.lipschitz_bound}"
            )
        self.token_radius = token_radius
        self.num_key_value_heads = num_key_value_heads or num_heads
        if num_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_heads` must be a multiple of `num_key_value_heads`. Received: "
                f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}"
            )
        self.flash_attention = flash_attention
        self.max_relative_position = max_relative_position

    @property
    def _projections(self):
        """Name, features, heads and size of a head of the three projections."""
        shared = self.num_key_value_heads
        return (
            ("query", self.features, self.num_heads, self.key_dim),
            ("key", self.key_features, shared, self.key_dim),
            ("value", self.value_features, shared, self.value_dim),
        )

    def add_kernels(self):
        for name, features, heads, size in self._projections:
            self.add_attention_kernel(f"{name}_kernel", (features, heads, size))
            setattr(self, f"{name}_bias", self.add_bias(f"{name}_bias", (heads, size)))
        shape = (self.num_heads, self.value_dim, *self.output_token)
        self.add_attention_kernel("output_kernel", shape, 2)
        self.relative_bias = None
        if self.max_relative_position is not None:
            self.relative_bias = self.add_weight(
                name="relative_bias",
                shape=(self.num_heads, 2 * self.max_relative_position),
                initializer="zeros",
            )

    def fold(self, kernels, factors, xp):
        if self.spectral_norm is not None:
            kernels = [
                self._rounded(kernel * factor, xp)
                for kernel, factor in zip(kernels, factors, strict=True)
            ]
        *projections, output = kernels
        # One matrix where it can be: self-attention is one product then.
        shape = (self.features, -1) if self._has_one_width else (-1,)
        flat = [xp.reshape(kernel, shape) for kernel in projections]
        projection = xp.concatenate(flat, axis=-1)
        query, key, value = (xp.transpose(kernel, (1, 0, 2)) for kernel in projections)
        if self._groups > 1:
            key, value = (xp.repeat(kernel, self._groups, axis=0) for kernel in (key, value))
        output = xp.reshape(output, (self.num_heads, self.value_dim, -1))
        return Folded(projection, query, key, value, output)

    @property
    def _has_one_width(self):
        return self.features == self.key_features == self.value_features

    @property
    def _groups(self):
        return self.num_heads // self.num_key_value_heads

    # Constants ----------------------------------------------------------------------------------

    def matrices(self, weights, norm, xp):
        _, *kernels = weights
        scaling, apart = self._scaling(weights, xp), self._bounds_apart(norm)
        return product_matrices(*kernels, norm=norm, scaling=scaling, apart=apart, xp=xp)

    def _bounds_apart(self, norm):
        """Whether a second bound is worth two more norms.

        By positions, heads can attend to single tokens, and then read different features.
        """
        return norm == "l2" and self.max_relative_position is not None

    def bound(self, weights, norms, norm, tokens, mask, xp):
        epsilon = float(np.finfo(self._norm_dtype).eps)
        # With the rounding of a graph on the host too: both must come to the same factor.
        pull = query_pull(weights.key, self._bias_of_queries(xp), xp, epsilon=epsilon)
        terms = product_terms(norms["head_score"], pull, self.token_radius, xp)
        mass = 1.0
        if norm == "l2":
            mass = column_masses(
                2.0 * terms.key,
                tokens,
                mask.mask,
                xp,
                relative_bias=self.score_biases(xp),
                causal=mask.causal,
                tensors=mask.tensors,
                n_queries=_number_of_queries(mask),
            )
        elif norm == "linf":
            widths = (self.features, self.key_features, self.value_features)
            terms = in_entries(terms, widths, xp)
        kind = "l2" if norm == "l2" else "token"
        return product_layer_bound(
            weights.output,
            combined(terms, kind, xp, mass=mass, tensors=mask.tensors),
            norm=norm,
            scaling=self._scaling(weights, xp),
            norms=norms,
            xp=xp,
            terms=terms if self._bounds_apart(norm) and mask.tensors == 1 else None,
            mass=mass,
        )

    def _scaling(self, weights, xp):
        _, *kernels = weights
        return product_scaling(*kernels, radius=self.token_radius, xp=xp)

    def _num_summands(self):
        return self.features + self.key_dim + 2 * self.value_dim + self.num_heads

    def _bias_of_queries(self, xp):
        """The query bias `(H, k)` as a call uses it, or `None`."""
        if self.query_bias is None:
            return None
        if self._condensed is not None:
            # A constant of the graph, as the kernels are: the factor of the cap depends on it.
            fixed = self._fixed_bias
            return fixed if xp is np else ops.convert_to_tensor(fixed, self._norm_dtype)
        if xp is np:
            return cast_to_compute_dtype(self.query_bias, self.compute_dtype)
        return ops.cast(ops.cast(self.query_bias, self.compute_dtype), self._norm_dtype)

    def enter_condensed(self):
        if self.built and not self.is_condensed:
            self._fixed_bias = self._bias_of_queries(np)
        super().enter_condensed()

    def score_biases(self, xp) -> Any:
        if self.relative_bias is None:
            return None
        if self._condensed is not None:
            biases = self._condensed.relative_bias
        elif xp is np:
            return cast_to_compute_dtype(self.relative_bias, self.compute_dtype)
        else:
            biases = ops.cast(self.relative_bias, self.compute_dtype)
        return biases if xp is np else ops.cast(biases, self._norm_dtype)

    def certified(self, norm, mask, tokens, cap_mask, ball=None):
        reason = self.bias_reason()
        if reason:
            return LipschitzBound(
                value=math.inf, norm=norm, kind="certified", theorem="", reason=reason
            )
        return certified_product_bound(
            self._kernels_on(ball, cap_mask),
            norm=norm,
            tokens=tokens,
            mask=mask.mask,
            causal=mask.causal,
            n_queries=_number_of_queries(mask),
            tensors=mask.tensors,
        )

    def cross_certified(self, norm, mask, queries, cap_mask):
        names = ("query", "value", "key")[: mask.tensors]
        reason = self.bias_reason()
        if reason:
            return {
                name: LipschitzBound(
                    value=math.inf, norm=norm, kind="certified", theorem="", reason=reason
                )
                for name in names
            }
        seen = _number_of_queries(mask)
        return certified_cross_bounds(
            self._kernels_on(None, cap_mask),
            norm=norm,
            queries=queries if seen is None else seen if queries is None else min(seen, queries),
            separate_key=mask.tensors == 3,
        )

    def _kernels_on(self, ball, cap_mask):
        """`ProductLayer` of the weights of inference.

        Args:
            ball: Center and radius of a smaller ball that holds every projected token, or `None`.
            cap_mask: `MaskClass` that the factor of `lipschitz_bound` is for.
        """
        state = self.host_weights()
        _, *kernels = state.weights(cap_mask)
        query, key, value, output = (np.asarray(kernel, np.float64) for kernel in kernels)
        bias, radius = self._bias_of_queries(np), self.token_radius
        if ball is not None:
            center, radius = ball
            moved = np.einsum("d,hdk->hk", center, query)
            bias = moved if bias is None else bias + moved
        return ProductLayer(query, key, value, output, radius, bias, state.relative_bias)

    # Calling ------------------------------------------------------------------------------------

    def attend(self, tokens, weights, mask, training, return_scores, keys=None, values=None):
        if keys is None and self._has_one_width:
            query, key, value = self._by_heads(self._projected_side_by_side(tokens, weights))
        else:
            inputs = tokens, keys, values
            kernels = self._split(weights.projection)
            query, key, value = map(self._projected, inputs, kernels, self._projections)
        heads, scores = attend_by_product(
            query,
            key,
            value,
            mask,
            dropout=self.dropout if training else 0.0,
            seed=self._seed_generator,
            training=training,
            return_scores=return_scores,
            flash_attention=self.flash_attention,
            dtype=self.compute_dtype,
        )
        return heads, None, scores

    def _split(self, projection):
        """The three projections `(features, heads * size)`."""
        if self._has_one_width:
            return self._parts(projection)
        sizes = [features * heads * size for _, features, heads, size in self._projections]
        parts = ops.split(projection, np.cumsum(sizes[:-1]).tolist())
        return [
            ops.reshape(part, (features, -1))
            for part, (_, features, _, _) in zip(parts, self._projections, strict=True)
        ]

    def _parts(self, joint):
        """Queries, keys and values side by side, `(..., N)`, apart.

        Not by slices: the derivative of each would be padded to the size of `joint`.
        """
        sizes = [heads * size for _, _, heads, size in self._projections]
        return ops.split(joint, np.cumsum(sizes[:-1]).tolist(), axis=-1)

    def _projected(self, tokens, kernel, projection):
        """One projection of tokens `(B, T, D)` by heads, `(B, heads, T, size)`."""
        name, _, heads, size = projection
        joint = affine(tokens, kernel, self._flat_bias(name) if self.use_bias else None)
        return _heads_first(joint, heads, size)

    def _flat_bias(self, name):
        bias = getattr(self, f"{name}_bias")
        if name == "query":
            bias = self._bias_of_queries(ops)
        return ops.reshape(ops.cast(bias, self.compute_dtype), (-1,))

    def _projected_side_by_side(self, tokens, weights):
        """Queries, keys and values of the same tokens `(B, T, D)`, `(B, T, N)`."""
        bias = None
        if self.use_bias:
            bias = ops.concatenate([self._flat_bias(name) for name, *_ in self._projections])
        return affine(tokens, weights.projection, bias)

    def _by_heads(self, joint):
        """Queries, keys and values `(B, heads, T, size)` of what is side by side."""
        shapes = [(heads, size) for _, _, heads, size in self._projections]
        if len(set(shapes)) > 1:
            parts = zip(self._parts(joint), shapes, strict=True)
            return [_heads_first(part, *shape) for part, shape in parts]
        batch, length, _ = ops.shape(joint)
        # One transposition in place of three.
        parts = ops.reshape(joint, (batch, length, 3, *shapes[0]))
        return ops.unstack(ops.transpose(parts, (2, 0, 3, 1, 4)))

    # Decoding -----------------------------------------------------------------------------------

    def init_cache(self, batch_size, length):
        """An empty cache for `decode`, of keys and values side by side.

        Args:
            batch_size: Number of sequences.
            length: Number of tokens that will be decoded at most.

        Returns:
            Tensor `(batch_size, length, num_key_value_heads * (key_dim + value_dim))`.

        Raises:
            ValueError: If the layer is not built, has not one attention axis of rank-3 input, or
                `length` exceeds the length `lipschitz_bound` is for.
        """
        require_positive_integer("batch_size", batch_size)
        require_positive_integer("length", length)
        if not self.built or not self.axes.is_plain or not self._has_one_width:
            raise ValueError(
                "Decoding needs a built layer for self-attention with inputs "
                f"`(batch, tokens, features)`. Received: built={self.built}, "
                f"attention_axes={self.attention_axes}"
            )
        self._check_length(length)
        size = self.num_key_value_heads * (self.key_dim + self.value_dim)
        return ops.zeros((batch_size, length, size), self.compute_dtype)

    def decode(self, inputs, cache, position):
        """Causal self-attention of a few new tokens over those decoded before.

        Gives what the layer gives with `use_causal_mask=True` on the whole sequence, at inference.
        Each call prepares the weights anew; inside `condensed(model)` they are constants.

        Args:
            inputs: Tensor `(B, S, D)`, the tokens at positions `position` to `position + S - 1`.
            cache: What `init_cache` or the previous call returned.
            position: Number of tokens decoded before, an integer or a scalar tensor.

        Returns:
            A pair: the output `(B, S, D_out)` and the new cache.
        """
        known = mask_class("causal", sliding_window=self.sliding_window)
        weights = self._in_compute_dtype(self.effective_weights(known))
        mask = Mask(use_causal_mask=True, sliding_window=self.sliding_window, keeps_diagonal=False)
        if weights.relative_bias is not None:
            mask = dataclasses.replace(mask, relative_bias=RelativeBias(weights.relative_bias))
        tokens = project_tokens(
            ops.cast(inputs, self.compute_dtype), self.token_radius, self.compute_dtype
        )
        joint = self._projected_side_by_side(tokens, weights)
        query, new = ops.split(joint, [self.num_heads * self.key_dim], axis=-1)
        query = _heads_first(query, self.num_heads, self.key_dim)
        position = ops.cast(position, "int32")
        cache = ops.slice_update(cache, (0, position, 0), new)
        shared = self.num_key_value_heads
        key, value = ops.split(cache, [shared * self.key_dim], axis=-1)
        key = _heads_first(key, shared, self.key_dim)
        value = _heads_first(value, shared, self.value_dim)
        heads = decode_by_product(query, key, value, position, mask, self.compute_dtype)
        bias = None
        if self.output_bias is not None:
            bias = ops.reshape(ops.cast(self.output_bias, self.compute_dtype), (-1,))
        output = affine(heads, weights.output, bias)
        return self.shape_outputs(output, inputs), cache

    def get_config(self):
        return {
            **super().get_config(),
            "token_radius": self.token_radius,
            "num_key_value_heads": self.num_key_value_heads,
            "flash_attention": self.flash_attention,
            "max_relative_position": self.max_relative_position,
        }


def _heads_first(joint, heads, size):
    """Features of heads side by side, `(B, T, heads * size)`, as `(B, heads, T, size)`."""
    batch, length, _ = ops.shape(joint)
    # The batch is spelled out: an empty tensor leaves no size to infer.
    return ops.transpose(ops.reshape(joint, (batch, length, heads, size)), (0, 2, 1, 3))


def _number_of_queries(mask):
    """The largest number of queries that see a key, `None` if unknown."""
    return None if mask.n_queries is None else mask.n_queries + 1
