"""Multi-head self-attention with a proven Lipschitz constant."""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_positive, require_positive_integer
from keras_lipattn.bounds.bounded_tokens import (
    BALL,
    distance_constants,
    distance_layer_bound,
    distance_terms,
    terms_by_input,
)
from keras_lipattn.bounds.head_scaling import frobenius_scaling
from keras_lipattn.bounds.key_weights import (
    seen_by_lag,
    weighted_constants,
    weighted_layer_bound,
    weighted_unit_bound,
    weights_by_lag,
    weights_of_tokens,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.mild_weights import mild_constants
from keras_lipattn.bounds.multihead import (
    certified_layer_bound,
    layer_matrices,
    published_layer_bound,
    running_layer_bound,
)
from keras_lipattn.bounds.unit_head import UNKNOWN_LENGTH, UnitBound, unit_head_bound
from keras_lipattn.layers._distance_attention import (
    attend_across,
    attend_by_distance,
    decode_by_distance,
)
from keras_lipattn.layers._masks import Mask, MaskClass, mask_class
from keras_lipattn.layers._norms import ExactNorms, ignore_floating_point_errors
from keras_lipattn.layers._precision import cast_to_compute_dtype
from keras_lipattn.layers._relative_bias import RelativeBias
from keras_lipattn.layers.self_attention import SelfAttention
from keras_lipattn.layers.token_projection import project_tokens
from keras_lipattn.linalg import SAFETY, fast_operator_norm


class Folded(NamedTuple):
    """The kernels of a layer, folded.

    Attributes:
        projection: `B` as the query kernel lies, `(D, H*K)`.
        b: All `B_h = W_Q,h / key_dim**0.25`, `(H, D, K)`.
        output: All `C_h = B_h^T W_V,h W_O,h`, `(H, K, O)`.
    """

    projection: Any
    b: Any
    output: Any


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
    certified constant. Only the output has a bias: a query bias would cancel in the distances, and
    a value bias would be absorbed by the output bias.

    **Bounded tokens.** With `token_radius` tokens are first projected onto a ball. In the token and
    max norms the constant then depends neither on the number of tokens, nor on masks, nor on
    relative positions (Theorem 4.2), and `lipschitz_bound` needs no `max_sequence_length`. Value
    and key may be other tensors than the query (cross-attention, Theorem 7.7):
    `cross_lipschitz()` returns the constant with respect to each of them. What is averaged are the
    projected tokens of the value. A query sees no key of its own there: where it sees none at all,
    its row is the output bias.

    **Masks.** The diagonal is always visible: whatever the masks say, a token attends to itself, or
    no bound exists. A token is padded when any of `query_mask`, `value_mask`, `key_mask` or the
    Keras mask of the input says so: no token sees it (not even a NaN in it) and its output row is
    zero. The certificate is for a fixed mask.

    **Relative positions.** With tied queries and keys a token's own score is the largest in its
    row. `max_relative_position` adds learned biases `b_h[i - j]` to the scores, with which a head
    can prefer the token before, for example. They increase the bound by little more than the
    logarithm of the total weight of the other keys. The bound stays independent of the length where
    biases fall with the distance.

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
        token_radius: If set to `r`, tokens are projected onto the ball of this radius before
            anything else; see `TokenProjection`.
        spectral_norm: If set to `c`, caps the operator norms of the query, value and output
            kernels, as the matrices `(D, H*key_dim)`, `(D, H*value_dim)`, `(H*value_dim, output)`.
        lipschitz_bound: If set to `L`, caps the constant of the whole layer in `lipschitz_norm` by
            scaling its output (before the bias) by `min(1, L / bound)`.
        lipschitz_norm: Norm of `lipschitz_bound`: `"l2"` (2-norm of all entries), `"token"`
            (largest 2-norm of a token) or `"linf"` (largest absolute entry).
        max_sequence_length: Number of tokens `lipschitz_bound` is for. The static length seen in
            `build` by default. A longer input is an error, or NaN rows where its length is not
            known before running. With `token_radius` it is needed in the 2-norm alone.
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
        value: Omitted, or `query` itself; with `token_radius` any tensor `(B, ..., S, D)`.
        key: Omitted, or `query` itself; with `token_radius` any tensor of the shape of `value`,
            which it is by default.
        query_mask: Boolean `(B, T)`, false where a token is padding.
        value_mask: The same, of `value`.
        key_mask: The same, of `key`.
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
        ValueError: For `value` or `key` other than the query without `token_radius`, arguments out
            of range, masks which
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

    _not_cross = "no Lipschitz bound exists for cross-attention"
    _unless = ", unless `token_radius` is set"
    _weighs_tokens = True

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
        token_radius=None,
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
        require_positive("token_radius", token_radius)
        self.max_relative_position = max_relative_position
        self.token_radius = token_radius
        self.flash_attention = flash_attention

    def _check_other_shapes(self, axes, query_shape, value_shape, key_shape):
        super()._check_other_shapes(axes, query_shape, value_shape, key_shape)
        for name, shape in (("value", value_shape), ("key", key_shape)):
            if shape is not None and shape[-1] != query_shape[-1]:
                raise ValueError(
                    f"One kernel projects all tokens: `{name}` must have the features of `query`, "
                    f"{query_shape[-1]}. Received: {name}_shape={tuple(shape)}"
                )

    def add_kernels(self):
        features, heads, value_dim = self.features, self.num_heads, self.value_dim
        self.add_attention_kernel("query_kernel", (features, heads, self.key_dim))
        self.add_attention_kernel("value_kernel", (features, heads, value_dim))
        self.add_attention_kernel("output_kernel", (heads, value_dim, *self.output_token), 2)
        self.relative_bias = None
        if self.max_relative_position is not None:
            # Of the keys R to 1 positions after a query, then of those 1 to R before it.
            shape = (heads, 2 * self.max_relative_position)
            self.relative_bias = self.add_weight(
                name="relative_bias", shape=shape, initializer="zeros"
            )

    def fold(self, kernels, factors, xp):
        query_factor, value_factor, output_factor = factors
        flat = self._rounded(kernels[0] * (query_factor * self.key_dim**-0.25), xp)
        b, value, output = self.by_head([flat, *kernels[1:]], xp)
        inner = xp.matmul(xp.transpose(b, (0, 2, 1)), value)
        if self.spectral_norm is not None:
            # Here the factors meet the fewest entries. One after the other: nothing underflows.
            inner = inner * value_factor * output_factor
        projection = xp.reshape(flat, (self.features, -1))
        return Folded(projection, b, xp.matmul(inner, output))

    def by_head(self, kernels, xp):
        """Query, value and output kernels as `(H, D, K)`, `(H, D, V)` and `(H, V, O)`."""
        query, value, output = kernels
        output = xp.reshape(output, (self.num_heads, self.value_dim, -1))
        return xp.transpose(query, (1, 0, 2)), xp.transpose(value, (1, 0, 2)), output

    def matrices(self, weights, norm, xp):
        matrices = layer_matrices(weights.b, weights.output, norm, xp)
        if self.token_radius is None or norm != "l2":
            return matrices
        return {**matrices, "head_query": weights.b}

    def bound(self, weights, norms, norm, tokens, mask, xp):
        b, c = weights.b, weights.output
        if self.token_radius is None:
            unit = self._unit_bound(norm, tokens, mask, xp)
            return running_layer_bound(b, c, norm=norm, unit=unit, norms=norms, xp=xp)
        radius = self.token_radius * norms["head_query"]
        relative_bias = self.score_biases(xp)
        constants, scores = self._ball_constants(radius, norm, tokens, mask, relative_bias, xp)
        if mask.tensors == 1 and (relative_bias is None or self._has_reach(tokens)):
            unit = self._unit_bound(norm, tokens, mask, xp)
            constants = xp.minimum(constants, unit.value)
            scores = xp.minimum(scores, unit.score_part)
        scale = None if norm == "linf" else frobenius_scaling(b, c, xp)
        return distance_layer_bound(
            b, c, constants, scores, norm=norm, scale=scale, norms=norms, xp=xp
        )

    def _ball_constants(self, radius, norm, tokens, mask, relative_bias, xp, *, exact=False):
        """Constants and score parts of the heads by Theorem 4.2, or 7.7 for other tensors."""
        return distance_constants(
            radius,
            norm,
            xp,
            tokens=tokens,
            mask=mask.mask,
            n_queries=None if mask.n_queries is None else mask.n_queries + 1,
            relative_bias=relative_bias,
            causal=mask.causal,
            tensors=mask.tensors,
            exact=exact,
        )

    def _num_summands(self):
        return self.features + self.key_dim + self.num_heads

    def _unit_bound(self, norm, tokens, mask, xp):
        """The constant of a head, with biases the largest of all heads in closed form."""
        relative_bias = self.score_biases(xp)
        if relative_bias is None:
            return unit_head_bound(tokens, norm=norm, **mask.arguments(tokens))
        if not self._has_reach(tokens):
            return UnitBound(math.inf, "", math.inf, UNKNOWN_LENGTH)
        # On the host too: both must come to the same factor.
        epsilon = float(np.finfo(self._norm_dtype).eps)
        weights = self._key_weights(relative_bias, tokens, mask, xp, epsilon=epsilon)
        unit = weighted_unit_bound(weights, norm, xp)
        return unit._replace(
            **{
                name: constant if isinstance(constant, float) else xp.max(constant)
                for name, constant in (("value", unit.value), ("score_part", unit.score_part))
            }
        )

    def _has_reach(self, tokens):
        return tokens is not None or self.sliding_window is not None

    def _key_weights(self, relative_bias, tokens, mask, xp, *, epsilon=0.0):
        """What other keys weigh by their relative positions."""
        seen = seen_by_lag(relative_bias, tokens, mask.causal, self.sliding_window, xp)
        degrees = {"n_keys": mask.n_keys, "n_queries": mask.n_queries}
        return weights_by_lag(*seen, tokens, xp, **degrees, epsilon=epsilon)

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
        mask, tokens = self.mask_and_length(sequence_length, norm, mask)
        return self.certified(norm, mask, tokens, mask, token_weights)

    def certified(self, norm, mask, tokens, cap_mask, token_weights=None):
        reason = self.bias_reason()
        if reason:
            return _no_bound(norm, reason)
        state = self.host_weights()
        weights = state.weights(cap_mask)
        b, c, relative_bias = weights.b, weights.output, state.relative_bias
        allowances = self.rounding_allowances(state, cap_mask)
        if self.token_radius is not None:
            return self._certified_on_ball(norm, mask, tokens, cap_mask, state, token_weights)
        if token_weights is not None:
            token_weights = self._flat_token_weights(token_weights)
            of_keys, reason = weights_of_tokens(token_weights, relative_bias)
            if reason:
                return _no_bound(norm, reason)
            return weighted_layer_bound(b, c, norm=norm, weights=of_keys, **allowances)
        if relative_bias is not None:
            if not self._has_reach(tokens):
                return _no_bound(norm, UNKNOWN_LENGTH)
            of_keys = self._key_weights(relative_bias, tokens, mask, np)
            mild: Any = math.inf
            if norm == "l2" and of_keys is not None:
                seen = seen_by_lag(relative_bias, tokens, mask.causal, self.sliding_window, np)
                totals = np.exp(np.minimum(of_keys.log_keys, 300.0))
                mild = mild_constants(*seen, tokens, totals, mask.arguments(tokens))
            return weighted_layer_bound(b, c, norm=norm, weights=of_keys, mild=mild, **allowances)
        return certified_layer_bound(
            b,
            c,
            norm=norm,
            tokens=tokens,
            **mask.arguments(tokens),
            **allowances,
            published=self._published(state, norm, tokens, cap_mask),
        )

    def _certified_on_ball(self, norm, mask, tokens, cap_mask, state, token_weights):
        """The certificate with `token_radius`: for each head the smaller one of two constants."""
        weights, relative_bias = state.weights(cap_mask), state.relative_bias
        allowances = self.rounding_allowances(state, cap_mask)
        unit, parts, unit_theorem = np.inf, np.inf, ""
        if token_weights is not None:
            token_weights = self._flat_token_weights(token_weights)
            others, reason = weights_of_tokens(token_weights, relative_bias)
            if reason:
                return _no_bound(norm, reason)
            unit, parts, unit_theorem = _weighted_unit(others, norm)
            # Of keys with weights only the number is used.
            mask, tokens = MaskClass("any"), token_weights.shape[-1]
        elif mask.tensors == 1 and relative_bias is not None:
            if self._has_reach(tokens):
                others = self._key_weights(relative_bias, tokens, mask, np)
                unit, parts, unit_theorem = _weighted_unit(others, norm)
        elif mask.tensors == 1:
            degrees = {"n_keys": mask.n_keys, "n_queries": mask.n_queries}
            unit, unit_theorem, parts, _ = unit_head_bound(tokens, mask.mask, norm, **degrees)
        radius = self._head_radii(weights, allowances)
        constants, scores = self._ball_constants(
            radius, norm, tokens, mask, relative_bias, np, exact=True
        )
        ball = BALL if mask.tensors == 1 else "Theorem 7.7"
        return certified_layer_bound(
            weights.b,
            weights.output,
            norm=norm,
            tokens=None,
            head_constants=np.minimum(SAFETY * constants, unit),
            head_scores=np.minimum(SAFETY * scores, parts),
            head_theorem=ball if np.any(SAFETY * constants < unit) else unit_theorem,
            **allowances,
            published=self._published(state, norm, tokens, cap_mask),
        )

    def _head_radii(self, weights, allowances):
        """Radii of the balls that hold the projected tokens of the heads, `(H,)`."""
        sizes = SAFETY * np.asarray(fast_operator_norm(np.asarray(weights.b, np.float64)))
        return self.token_radius * (sizes + allowances["query_error"])

    def cross_certified(self, norm, mask, queries, cap_mask):
        """The constants of `cross_lipschitz` for a class of mask and a number of queries."""
        names = ("query", "value", "key")[: mask.tensors]
        reason = self.bias_reason()
        seen = queries if mask.n_queries is None else mask.n_queries + 1
        if not reason and norm == "l2" and seen is None:
            reason = UNKNOWN_LENGTH
        if reason:
            return {name: _no_bound(norm, reason) for name in names}
        state = self.host_weights()
        weights, allowances = state.weights(cap_mask), self.rounding_allowances(state, cap_mask)
        terms = distance_terms(self._head_radii(weights, allowances), np)
        parts = terms_by_input(terms, separate_key=mask.tensors == 3)
        scores = {"query": terms.query, "value": terms.key, "key": terms.key}
        # A key is seen by so many queries.
        mass = math.sqrt(seen) if norm == "l2" and seen is not None else 1.0
        return {
            name: certified_layer_bound(
                weights.b,
                weights.output,
                norm=norm,
                tokens=None,
                head_constants=SAFETY * part * (1.0 if name == "query" else mass),
                head_scores=SAFETY * scores[name],
                head_theorem="Theorem 7.7",
                **allowances,
            )
            for name, part in parts.items()
        }

    def rounding_allowances(self, state, cap_mask):
        """What the certificate allows for the weights that run to differ from the rounded ones.

        Args:
            state: `HostWeights`.
            cap_mask: `MaskClass` that the factor of `lipschitz_bound` is for.

        Returns:
            Dictionary of arrays `(H,)`. `product_scale`: `|B_h| |W_V,h| |W_O,h|` in Frobenius norm,
            times the factor, from which the entries of `C_h` may have canceled. `query_error` and
            `product_error`: Frobenius norms of the differences between the rounded `B_h`, and `C_h`
            with its factor, and the exact ones.
        """
        weights, factor = state.weights(cap_mask), state.factor(cap_mask)
        with ignore_floating_point_errors():
            _, value, output = self._capped_kernels(state)
            sizes = [
                np.linalg.norm(matrix.astype(np.float64), axis=(1, 2))
                for matrix in (state.rounded.b, value, output)
            ]
            exact_output = self._rounded(state.exact.output * factor, np)
            return {
                "product_scale": np.prod(sizes, axis=0) * factor,
                "query_error": np.linalg.norm(weights.b - state.exact.b, axis=(1, 2)),
                "product_error": np.linalg.norm(weights.output - exact_output, axis=(1, 2)),
            }

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        bound = super().graph_bound(norm=norm, sequence_length=sequence_length, mask=mask)
        plain = self.relative_bias is None and self.token_radius is None
        if self._condensed is None or plain or math.isinf(bound):
            return bound
        # What a graph divides by must not change by condensing it: its formula is less tight.
        mask, tokens = self.mask_and_length(sequence_length, norm, mask)
        weights = self._condensed.weights(mask)
        weights = weights._replace(
            b=weights.b.astype(np.float64), output=weights.output.astype(np.float64)
        )
        formula = self._bound(weights, ExactNorms(), norm, tokens, mask, np)
        return max(bound, float(formula))

    def _capped_kernels(self, state):
        """Kernels under `spectral_norm`, by head, on the host."""
        kernels = state.kernels
        if self.spectral_norm is not None:
            kernels = [
                kernel * factor for kernel, factor in zip(kernels, state.factors, strict=True)
            ]
        return self.by_head(kernels, np)

    def _flat_token_weights(self, token_weights):
        """Weights in the compute dtype, `(..., T)` with one axis of tokens."""
        weights = cast_to_compute_dtype(np.asarray(token_weights), self.compute_dtype)
        if self.axes.is_plain:
            return weights
        if weights.ndim != self.input_spec.ndim - 1:
            raise ValueError(
                "With several axes `token_weights` must have those of the input but for the "
                f"features. Received: token_weights of shape {weights.shape}"
            )
        return ops.convert_to_numpy(self.axes.flatten_mask(ops.convert_to_tensor(weights)))

    def _published(self, state, norm, tokens, cap_mask):
        """The bound of Kim et al. for the weights of inference."""
        if tokens is None:
            return math.inf
        # Their bound is linear in the output kernel, which the layer's factor multiplies.
        with ignore_floating_point_errors():
            query, value, output = self._capped_kernels(state)
            output = output * state.factor(cap_mask)
        return published_layer_bound(query, value, output, norm=norm, tokens=tokens)

    # Calling ----------------------------------------------------------------------------------

    def attend(self, tokens, weights, mask, training, return_scores, keys=None, values=None):
        if keys is not None:
            return attend_across(
                tokens,
                keys,
                values,
                weights.projection,
                mask,
                num_heads=self.num_heads,
                dropout=self.dropout if training else 0.0,
                seed=self._seed_generator,
                dtype=self.compute_dtype,
            )
        return attend_by_distance(
            tokens,
            weights.projection,
            mask,
            num_heads=self.num_heads,
            dropout=self.dropout if training else 0.0,
            seed=self._seed_generator,
            training=training,
            return_scores=return_scores,
            flash_attention=self.flash_attention,
            dtype=self.compute_dtype,
        )

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
        if not self.built or not self.axes.is_plain:
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
        known = mask_class("causal", sliding_window=self.sliding_window)
        weights = self._in_compute_dtype(self.effective_weights(known))
        mask = Mask(use_causal_mask=True, sliding_window=self.sliding_window)
        if weights.relative_bias is not None:
            mask = dataclasses.replace(mask, relative_bias=RelativeBias(weights.relative_bias))
        new = ops.cast(inputs, self.compute_dtype)
        if self.token_radius is not None:
            new = project_tokens(new, self.token_radius, self.compute_dtype)
        new = ops.matmul(new, weights.projection)
        position = ops.cast(position, "int32")
        cache = ops.slice_update(cache, (0, position, 0), new)
        heads = decode_by_distance(new, cache, position, mask, self.num_heads)
        output = ops.matmul(heads, weights.output)
        if self.output_bias is not None:
            output = output + ops.reshape(ops.cast(self.output_bias, self.compute_dtype), (-1,))
        return self.shape_outputs(output, inputs), cache

    def get_config(self):
        config = super().get_config()
        items = list(config.items())
        # Where the constructor has it.
        at = list(config).index("spectral_norm")
        names = ("flash_attention", "max_relative_position", "token_radius")
        own = [(name, getattr(self, name)) for name in names]
        return dict([*items[:at], *own, *items[at:]])


def _no_bound(norm, reason):
    return LipschitzBound(value=math.inf, norm=norm, kind="certified", theorem="", reason=reason)


def _weighted_unit(weights, norm):
    """Constants of the unit head for weighted keys, their score parts, and the theorem."""
    unit = weighted_unit_bound(weights, norm, np)
    return weighted_constants(weights, norm), SAFETY * np.asarray(unit.score_part), unit.theorem
