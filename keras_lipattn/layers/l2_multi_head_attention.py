"""Multi-head self-attention with a proven Lipschitz constant."""

import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_lipattn.bounds.head_scaling import frobenius_scaling
from keras_lipattn.bounds.key_weights import (
    weighted_layer_bound,
    weighted_unit_bound,
    weights_by_lag,
    weights_of_tokens,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import (
    certified_layer_bound,
    published_layer_bound,
    running_layer_bound,
    split_bound_l2,
    split_bound_token,
)
from keras_lipattn.bounds.unit_head import UNKNOWN_LENGTH, UnitBound, unit_head_bound
from keras_lipattn.layers._arguments import require_positive_integer
from keras_lipattn.layers._as_run import as_run, is_finite_as_run
from keras_lipattn.layers._condensed_attention import CondensedAttention
from keras_lipattn.layers._condensed_weights import HeldWeights
from keras_lipattn.layers._distance_attention import (
    BLOCKED_FROM,
    Mask,
    attention_weights,
    causal_weights,
    mixed,
    mixed_in_blocks,
)
from keras_lipattn.layers._fused_attention import (
    blocks_will_do,
    fused_attention,
    takes_kernel,
)
from keras_lipattn.layers._operator_norms import ExactNorms, GramNorms, quiet
from keras_lipattn.layers._relative_bias import RelativeBias, by_distance
from keras_lipattn.layers._self_attention import SelfAttention
from keras_lipattn.layers._visibility import classify


@keras.saving.register_keras_serializable(package="keras_lipattn")
class L2MultiHeadAttention(SelfAttention):
    """Multi-head L2 self-attention: a drop-in for `keras.layers.MultiHeadAttention` with a proof.

    With tokens `X` of shape `(T, D)`, head `h` projects `Y = X W_Q / key_dim**0.25` once, for
    queries, keys and values alike, and attends by distance:

    ```
    P_ij   = softmax_j(-|y_i - y_j|^2)
    output = sum_h P_h Y_h (W_Q,h^T / key_dim**0.25) W_V,h W_O,h + bias
    ```

    Queries and keys are tied and the factor `W_Q W_Q^T / sqrt(key_dim)` stands between attention
    and values: without either no finite Lipschitz constant exists. `lipschitz()` returns the
    certified constant. Nothing but the output has a bias: one of the query moves every token alike
    and changes nothing, one of the value is absorbed.

    **Masks.** The diagonal is always visible: whatever the masks say, a token attends to itself, or
    no bound exists. A token is padded when any of `query_mask`, `value_mask`, `key_mask` or the
    Keras mask of the input says so: nobody sees it (not even a NaN in it) and its output row is
    zero. The certificate is for a fixed mask.

    **Relative positions.** A token hears none louder than itself: with `W_Q` for queries and keys
    the own distance is 0. `max_relative_position` adds learned biases `b_h[i - j]` to the scores,
    which let a head prefer the token before, say. They cost the bounds little more than the
    logarithm of what the other keys weigh, and nothing in the length where biases far away fall.

    Args:
        num_heads: Number of attention heads.
        key_dim: Size of each head for query and key.
        value_dim: Size of each head for value; `key_dim` by default.
        dropout: Dropout probability of attention weights, in training.
        use_bias: Whether the output has a bias.
        output_shape: Shape of an output token, an integer or a tuple; the input's by default.
        attention_axes: Axes over which attention is applied; all but batch and features by
            default. Several axes are flattened row-major into one sequence.
        sliding_window: If set to `w`, a query sees tokens less than `w` positions away. The bound
            does not depend on the sequence length then.
        flash_attention: Whether to use a backend's fused kernel: `False` for never, `True` for
            wherever it has one that keeps scores accurate, by default where that is expected to
            pay. TensorFlow has none; the function is the same. None takes relative positions.
        max_relative_position: If set to `R`, every head learns a bias of its scores for each
            distance from 1 to R, before and after, that starts at 0; tokens further apart share the
            last one. Positions are those of the flattened sequence. The biases, `relative_bias`,
            have no regularizer or constraint.
        spectral_norm: If set to `c`, caps the operator norms of the query, value and output
            kernels, as the matrices `(D, H*key_dim)`, `(D, H*value_dim)`, `(H*value_dim, output)`.
        lipschitz_bound: If set to `L`, caps the constant of the whole layer in `lipschitz_norm` by
            scaling its output (before the bias) by `min(1, L / bound)`.
        lipschitz_norm: Norm of `lipschitz_bound`: `"l2"` (2-norm of all entries), `"token"`
            (largest 2-norm of a token) or `"linf"` (largest absolute entry).
        max_sequence_length: Number of tokens `lipschitz_bound` is for. The static length seen in
            `build` by default. A longer input is an error, or NaN rows where its length is not
            known before running.
        kernel_initializer: Initializer of the three kernels, as the matrices above.
        bias_initializer: Initializer of the output bias.
        kernel_regularizer: Regularizer of the three kernels.
        bias_regularizer: Regularizer of the output bias.
        activity_regularizer: Regularizer of the layer's output.
        kernel_constraint: Constraint of the three kernels.
        bias_constraint: Constraint of the output bias.
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
        token_weights: Weights `(B, T)` of the tokens as keys, not negative: the sequence as a
            measure, in which two equal tokens of half the weight are one. A weight of 0 means
            padding, a common factor nothing. The certificate is for equal weights, unless
            `lipschitz` is told of these; `lipschitz_bound` is refused.

    Returns:
        Tensor `(B, ..., T, D_out)`; with `return_attention_scores` also the weights `(B, H, T, T)`.
        With more axes their shape is that of `keras.layers.MultiHeadAttention`: batch, axes without
        attention, heads, axes of the queries, axes of the keys.

    Raises:
        ValueError: For `value` or `key` other than the query, arguments out of range, masks which
            do not fit, `lipschitz_bound` with an unknown length, or an input longer than the
            length `lipschitz_bound` is for.

    Example:

    >>> layer = L2MultiHeadAttention(num_heads=4, key_dim=16, lipschitz_bound=1.0)
    >>> x = keras.random.normal((2, 10, 64))
    >>> keras.ops.shape(layer(x))
    (2, 10, 64)
    >>> layer.lipschitz().value <= 1.0
    True

    Reference:
        Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 4
        (the layer); docs/theory.md, Sections 3 to 5 (the bounds).
    """

    _projections = ("query", "value", "output")
    _bound_norms: ClassVar = {
        "l2": ("concatenated_query", "stacked_output"),
        "token": ("stacked_output", "head_query"),
        "linf": ("head_query",),
    }
    _not_cross = "no Lipschitz bound exists for cross-attention"

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        max_relative_position=None,
        spectral_norm=None,
        lipschitz_bound=None,
        lipschitz_norm="l2",
        max_sequence_length=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        seed=None,
        **kwargs,
    ):
        if kwargs.pop("use_gate", False):
            raise ValueError(
                "`use_gate` is not supported: multiplying by a gate computed from the input has no "
                "Lipschitz bound. Received: use_gate=True"
            )
        super().__init__(
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            spectral_norm=spectral_norm,
            lipschitz_bound=lipschitz_bound,
            lipschitz_norm=lipschitz_norm,
            max_sequence_length=max_sequence_length,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            seed=seed,
            **kwargs,
        )
        require_positive_integer("max_relative_position", max_relative_position, optional=True)
        self.max_relative_position = max_relative_position
        self.flash_attention = flash_attention

    def _add_kernels(self):
        features, heads, value_dim = self._features, self.num_heads, self.value_dim
        self.query_kernel = self._add_kernel("query_kernel", (features, heads, self.key_dim), 1)
        self.value_kernel = self._add_kernel("value_kernel", (features, heads, value_dim), 1)
        self.output_kernel = self._add_kernel(
            "output_kernel", (heads, value_dim, *self._output_token), 2
        )
        self.relative_bias = None
        if self.max_relative_position is not None:
            # Of the keys R to 1 positions after a query, then of those 1 to R before it.
            shape = (heads, 2 * self.max_relative_position)
            self.relative_bias = self.add_weight(
                name="relative_bias", shape=shape, initializer="zeros"
            )

    # What the base classes ask for ------------------------------------------------------------

    def _kernels(self):
        return [self.query_kernel, self.value_kernel, self.output_kernel]

    def _norm_shapes(self):
        features, outputs = self._features, math.prod(self._output_token)
        heads, key_dim, value_dim = self.num_heads, self.key_dim, self.value_dim
        return {
            "query": (features, heads * key_dim),
            "value": (features, heads * value_dim),
            "output": (heads * value_dim, outputs),
            "concatenated_query": (features, heads * key_dim),
            "stacked_output": (heads * key_dim, outputs),
            "head_query": (heads, features, key_dim),
        }

    def _request_norms(self, kernels, norms, names, xp):
        for name, kernel in zip(self._projections, kernels, strict=True):
            if name in names:
                norms(name, self._as_operator(name, kernel, xp))
        _, b, c = self._fold(kernels, norms, xp)
        if "stacked_output" in names:
            split = split_bound_l2 if "concatenated_query" in names else split_bound_token
            split(b, c, frobenius_scaling(b, c, xp), norms, xp)
        if "head_query" in names:
            norms("head_query", b)

    def _capped(self, kernels, norms, xp):
        """Kernels under their caps, by head: `(H, D, K)`, `(H, D, V)` and `(H, V, O)`."""
        if self.spectral_norm is not None:
            factors = self._cap_factors(kernels, norms, xp)
            kernels = [kernel * factor for kernel, factor in zip(kernels, factors, strict=True)]
        return self._by_head(kernels, xp)

    def _cap_factors(self, kernels, norms, xp):
        """What `spectral_norm` multiplies the kernels with."""
        if self.spectral_norm is None:
            return [1.0] * len(kernels)
        return [
            self._cap_factor(
                norms(name, self._as_operator(name, kernel, xp)),
                self.spectral_norm,
                self._norm_shapes()[name],
                xp,
            )
            for name, kernel in zip(self._projections, kernels, strict=True)
        ]

    def _by_head(self, kernels, xp):
        query, value, output = kernels
        output = xp.reshape(output, (self.num_heads, self.value_dim, -1))
        return xp.transpose(query, (1, 0, 2)), xp.transpose(value, (1, 0, 2)), output

    def _fold(self, kernels, norms, xp):
        """`B = W_Q / key_dim**0.25` under its cap, by head and folded with the other kernels.

        Returns:
            `B` as the kernel lies, `(D, H, K)`, all `B_h`, `(H, D, K)`, and all
            `C_h = B_h^T W_V,h W_O,h`, `(H, K, O)`.
        """
        of_query, of_value, of_output = self._cap_factors(kernels, norms, xp)
        flat = self._rounded(kernels[0] * (of_query * self.key_dim**-0.25), xp)
        b, value, output = self._by_head([flat, *kernels[1:]], xp)
        inner = xp.matmul(xp.transpose(b, (0, 2, 1)), value)
        if self.spectral_norm is not None:
            # Here they meet the fewest entries. One after the other, so that nothing underflows.
            inner = inner * of_value * of_output
        return flat, b, xp.matmul(inner, output)

    def _layer_factor(self, b, c, norms, visibility, xp):
        """What `lipschitz_bound` multiplies the output with."""
        if self.lipschitz_bound is None:
            return 1.0
        bound = self._formula(
            b, c, self.lipschitz_norm, self.max_sequence_length, visibility, norms, xp
        )
        if self.lipschitz_norm == "linf":
            bound = bound * self._sum_slack(self._features + self.key_dim + self.num_heads)
        shape = self._norm_shapes()["stacked_output"]
        return self._cap_factor(bound, self.lipschitz_bound, shape, xp)

    def _formula(self, b, c, norm, tokens, visibility, norms, xp):
        unit = self._unit_bound(norm, tokens, visibility, xp)
        return running_layer_bound(b, c, norm=norm, unit=unit, operator_norm=norms, xp=xp)

    def _unit_bound(self, norm, tokens, visibility, xp):
        """The constant of a head, with biases the largest of all heads in closed form."""
        if self.relative_bias is None:
            return unit_head_bound(
                tokens,
                visibility.mask,
                norm,
                n_keys=visibility.n_keys,
                n_queries=visibility.n_queries,
            )
        if not self._has_reach(tokens):
            return UnitBound(math.inf, "", math.inf, UNKNOWN_LENGTH)
        # On the host too: both must come to the same factor.
        epsilon = float(np.finfo(self._norm_dtype).eps)
        weights = self._key_weights(tokens, visibility, xp, epsilon=epsilon)
        unit = weighted_unit_bound(weights, norm, xp)
        return unit._replace(
            **{
                name: constant if isinstance(constant, float) else xp.max(constant)
                for name, constant in (("value", unit.value), ("score_part", unit.score_part))
            }
        )

    def _has_reach(self, tokens):
        return tokens is not None or self.sliding_window is not None

    def _key_weights(self, tokens, visibility, xp, *, epsilon=0.0):
        """What other keys weigh by their relative positions."""
        table = self._bias_table(xp)
        seen = by_distance(table, tokens, visibility.causal, self.sliding_window, xp)
        degrees = {"n_keys": visibility.n_keys, "n_queries": visibility.n_queries}
        return weights_by_lag(*seen, tokens, xp, **degrees, epsilon=epsilon)

    def _bias_table(self, xp):
        """Biases as they run, those of when the layer was condensed if it is."""
        table = getattr(self._condensed, "biases", None)
        if xp is np:
            return as_run(self.relative_bias, self.compute_dtype) if table is None else table
        table = self.relative_bias if table is None else table
        return ops.cast(ops.cast(table, self.compute_dtype), self._norm_dtype)

    def _relative_biases(self):
        return None if self.relative_bias is None else RelativeBias(self._bias_table(ops))

    def _condense(self):
        return CondensedAttention(self)

    def _hold(self, mask):
        b, c, _ = self._weights(classify(mask, sliding_window=self.sliding_window), training=False)
        return HeldWeights(b, c)

    # Certificate ------------------------------------------------------------------------------

    def lipschitz(
        self, sequence_length=None, norm="l2", mask: Any = "full", token_weights: Any = None
    ) -> LipschitzBound:
        """Certified Lipschitz constant at inference, for the weights now loaded.

        Args:
            sequence_length: Largest number of tokens; by default the length the layer was built
                with (`max_sequence_length`, else the static length of its input).
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry), of inputs and outputs alike.
            mask: What the layer is called with: `"full"` or `"causal"` (either with any padding),
                `"any"` for an `attention_mask` whose entries are not known, or a boolean array
                `(..., T, T)` of visible pairs, whose degrees and length count; either `T` may be 1
                and broadcasts. The layer's window is added. With `lipschitz_bound` each of them
                has a cap of its own.
            token_weights: Weights `(..., T)` that the layer is called with, or `None` for equal
                ones. The constant is for these weights then, and for any mask.

        Returns:
            A `LipschitzBound` of kind `"certified"`: an upper bound in real arithmetic for a fixed
            mask. Its value is `inf`, with the reason, when weights are not finite or the length is
            not known.

        Raises:
            ValueError: If the layer is not built, or an argument is out of range.
        """
        visibility, tokens = self._asked(sequence_length, norm, mask)
        return self.certified(norm, visibility, tokens, visibility, token_weights)

    def certified(self, norm, visibility, tokens, capped_for, token_weights=None):
        """What `lipschitz` returns, where caps are for another class of mask than the constant."""
        biases = {"output": self.output_bias, "relative": self.relative_bias}
        for name, values in biases.items():
            if not is_finite_as_run(values, self.compute_dtype):
                return _no_bound(norm, f"the {name} bias holds NaN or infinite entries")
        state = self._condensed or CondensedAttention(self)
        b, c = state.heads(capped_for)
        query_error, product_error = state.rounding(capped_for)
        allowances = {
            "product_scale": state.product_scale(capped_for),
            "query_error": query_error,
            "product_error": product_error,
        }
        if token_weights is not None:
            token_weights = self._flat_token_weights(token_weights)
            biases = None if self.relative_bias is None else self._bias_table(np)
            weights, reason = weights_of_tokens(token_weights, biases)
            if reason:
                return _no_bound(norm, reason)
            return weighted_layer_bound(b, c, norm=norm, weights=weights, **allowances)
        if self.relative_bias is not None:
            if not self._has_reach(tokens):
                return _no_bound(norm, UNKNOWN_LENGTH)
            weights = self._key_weights(tokens, visibility, np)
            return weighted_layer_bound(b, c, norm=norm, weights=weights, **allowances)
        return certified_layer_bound(
            b,
            c,
            norm=norm,
            tokens=tokens,
            mask=visibility.mask,
            n_keys=visibility.n_keys,
            n_queries=visibility.n_queries,
            **allowances,
            published=self._published(state, norm, tokens, capped_for),
        )

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        visibility, tokens = self._asked(sequence_length, norm, mask)
        if self._condensed is not None:
            certified = self.lipschitz(sequence_length, norm, mask).value
            if self.relative_bias is None or math.isinf(certified):
                return certified
            # What a graph divides by must not change by condensing it: its formula is less tight.
            b, c = (matrix.astype(np.float64) for matrix in self._condensed.heads(visibility))
            formula = self._formula(b, c, norm, tokens, visibility, ExactNorms(), np)
            return max(certified, float(formula))
        kernels = self._graph_kernels()
        norms = self._norms_for(kernels, training=False)
        _, b, c = self._fold(kernels, norms, ops)
        bound = self._formula(b, c, norm, tokens, visibility, GramNorms(), ops)
        return bound * self._layer_factor(b, c, norms, visibility, ops)

    def _flat_token_weights(self, token_weights):
        """Weights as they run, `(..., T)` with one axis of tokens."""
        weights = as_run(np.asarray(token_weights), self.compute_dtype)
        if self._axes.is_plain:
            return weights
        if weights.ndim != self.input_spec.ndim - 1:
            raise ValueError(
                "With several axes `token_weights` must have those of the input but for the "
                f"features. Received: token_weights of shape {weights.shape}"
            )
        return ops.convert_to_numpy(self._axes.flatten_mask(ops.convert_to_tensor(weights)))

    def _published(self, state, norm, tokens, visibility):
        """The bound of Kim et al. for the weights that run."""
        if tokens is None:
            return math.inf
        query, value, output = state.kernels
        # Their bound is linear in the output kernel, which is where the layer's factor goes.
        with quiet():
            output = output * state.factor(visibility)
        return published_layer_bound(query, value, output, norm=norm, tokens=tokens)

    # Calling ----------------------------------------------------------------------------------

    def call(
        self,
        query,
        value=None,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        token_weights=None,
    ):
        return self._run(
            query,
            value,
            key,
            query_mask,
            value_mask,
            key_mask,
            attention_mask,
            return_attention_scores,
            training,
            use_causal_mask,
            token_weights,
        )

    def _weights(self, visibility, training):
        """Effective weights of this call: `B` `(D, H*K)`, `C` `(H*K, O)`, bias `(O,)` or `None`."""
        if self._condensed is not None:
            b, c = self._condensed.tensors(visibility)
        else:
            kernels = self._graph_kernels()
            norms = self._norms_for(kernels, training)
            flat, heads, c = self._fold(kernels, norms, ops)
            factor = self._layer_factor(heads, c, norms, visibility, ops)
            if training and self._tracking is not None:
                self._track(heads, c, factor, norms, visibility)
            if training and norms is not None:
                norms.commit()
            # The heads side by side, as they are in the kernel: cheaper than turning `b` back.
            b = self._as_operator("query", flat, ops)
            c = ops.reshape(c * factor, (-1, c.shape[-1]))
        bias = self.output_bias
        return (
            ops.cast(b, self.compute_dtype),
            ops.cast(c, self.compute_dtype),
            None if bias is None else ops.reshape(ops.cast(bias, self.compute_dtype), (-1,)),
        )

    def _track(self, b, c, factor, norms, visibility):
        tokens = self._tracked_length(visibility)
        bound = self._formula(b, c, self._tracking.norm, tokens, visibility, norms, ops)
        self._record(bound * factor)

    def _attend(self, tokens, b, mask, training, return_scores):
        """Mixed projections `(B, T, H*K)`, what to add to them, the weights if asked for.

        What to add is `(B, 1, H*K)`, or `None` where it was added already.
        """
        # Distances do not change under a shift, their expansion loses digits far from the origin.
        x = ops.cast(tokens, self._norm_dtype)
        if mask.valid is not None:
            x = ops.where(ops.expand_dims(mask.valid, -1), x, ops.zeros_like(x))
        centre = ops.stop_gradient(_centre(x, mask))
        near = self._split_heads(ops.matmul(ops.cast(x - centre, self.compute_dtype), b))
        shift = ops.matmul(ops.cast(centre, self.compute_dtype), b)
        y = ops.cast(near, self._norm_dtype)
        drop = training and self.dropout > 0.0
        if not (drop or return_scores):
            # Kernels of backends know of neither.
            plain = mask.relative_bias is not None or mask.log_weights is not None
            if not plain and takes_kernel(y, self.compute_dtype, self.flash_attention):
                return self._join_heads(fused_attention(y, mask, self.compute_dtype)), shift, None
            length = tokens.shape[1]
            if length is not None and length >= BLOCKED_FROM and blocks_will_do():
                heads = ops.cast(mixed_in_blocks(y, mask), self.compute_dtype)
                return self._join_heads(heads), shift, None
            # Only where a step will be taken: a served graph stays one of plain operations.
            if training and self.compute_dtype == self._norm_dtype:
                return self._join_heads(mixed(y, mask)), shift, None
        weights = ops.cast(attention_weights(y, mask), self.compute_dtype)
        if drop:
            kept = keras.random.dropout(weights, self.dropout, seed=self._seed_generator)
            # Rows no longer sum to one: the centre must be weighted like the tokens.
            heads = self._join_heads(ops.matmul(kept, near + self._split_heads(shift)))
            shift = None
        else:
            heads = self._join_heads(ops.matmul(weights, near))
        return heads, shift, weights

    def _join_heads(self, heads):
        batch, _, length, _ = ops.shape(heads)
        joined = ops.transpose(heads, (0, 2, 1, 3))
        return ops.reshape(joined, (batch, length, self.num_heads * self.key_dim))

    def _split_heads(self, projected):
        # The batch is spelled out: an empty tensor leaves no size to infer.
        batch, length, _ = ops.shape(projected)
        heads = ops.reshape(projected, (batch, length, self.num_heads, self.key_dim))
        return ops.transpose(heads, (0, 2, 1, 3))

    # Decoding ---------------------------------------------------------------------------------

    def init_cache(self, batch_size, length):
        """An empty cache for `decode`: one tensor, since keys are values.

        Args:
            batch_size: Number of sequences.
            length: Number of tokens that will be decoded at most.

        Returns:
            Tensor `(batch_size, length, num_heads * key_dim)`, half of what keys and values of the
            standard layer take.

        Raises:
            ValueError: If the layer is not built, has not one attention axis of rank-3 input, or
                `length` exceeds the length `lipschitz_bound` is for.
        """
        require_positive_integer("batch_size", batch_size)
        require_positive_integer("length", length)
        if not self.built or not self._axes.is_plain:
            raise ValueError(
                "Decoding needs a built layer with inputs `(batch, tokens, features)`. "
                f"Received: built={self.built}, attention_axes={self.attention_axes}"
            )
        self._check_length(length)
        return ops.zeros((batch_size, length, self.num_heads * self.key_dim), self.compute_dtype)

    def decode(self, inputs, cache, position):
        """Causal attention of a few new tokens over those decoded before.

        Gives what the layer gives with `use_causal_mask=True` on the whole sequence, at inference.
        Each call prepares the weights anew; inside `condensed(model)` they are constants.

        Args:
            inputs: Tensor `(B, S, D)`, the tokens at positions `position` to `position + S - 1`.
            cache: What `init_cache` or the previous call returned.
            position: Number of tokens decoded before, an integer or a scalar tensor.

        Returns:
            A pair: the output `(B, S, D_out)` and the new cache.
        """
        mask = Mask(
            use_causal_mask=True,
            sliding_window=self.sliding_window,
            relative_bias=self._relative_biases(),
        )
        visibility = classify("causal", sliding_window=self.sliding_window)
        b, c, bias = self._weights(visibility, training=False)
        new = ops.matmul(ops.cast(inputs, self.compute_dtype), b)
        position = ops.cast(position, "int32")
        cache = ops.slice_update(cache, (0, position, 0), new)
        # The first token is seen by every other: the origin it was in the full pass.
        origin = ops.cast(cache[:, :1], self._norm_dtype)
        near = self._split_heads(ops.cast(cache, self._norm_dtype) - origin)
        rows = self._split_heads(ops.cast(new, self._norm_dtype) - origin)
        mixed = ops.matmul(causal_weights(near, rows, position, mask), near)
        heads = ops.cast(self._join_heads(mixed) + origin, self.compute_dtype)
        output = ops.matmul(heads, c)
        return self._shape_token(output if bias is None else output + bias), cache

    def get_config(self):
        config = super().get_config()
        items = list(config.items())
        # Where the constructor has it.
        at = list(config).index("spectral_norm")
        names = ("flash_attention", "max_relative_position")
        own = [(name, getattr(self, name)) for name in names]
        return dict([*items[:at], *own, *items[at:]])


def _no_bound(norm, reason):
    return LipschitzBound(value=math.inf, norm=norm, kind="certified", theorem="", reason=reason)


def _centre(x, mask):
    """A point near the tokens, `(B, 1, D)`: their mean, or the first one where some are hidden.

    With a causal mask the mean would let rounding errors depend on tokens a query may not see.
    """
    valid = mask.valid
    if not mask.all_see_all:
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
