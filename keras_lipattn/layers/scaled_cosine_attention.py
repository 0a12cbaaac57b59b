"""Multi-head self-attention by cosines, with a proven Lipschitz constant."""

import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_lipattn.bounds.cosine import (
    certified_cosine_bound,
    cosine_layer_bound,
    fold,
    visible_mass,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._arguments import require_positive
from keras_lipattn.layers._as_run import is_finite_as_run
from keras_lipattn.layers._condensed_cosine import CondensedCosine
from keras_lipattn.layers._condensed_weights import HeldWeights
from keras_lipattn.layers._cosine_attention import cosine_weights, normalized
from keras_lipattn.layers._operator_norms import GramNorms
from keras_lipattn.layers._self_attention import SelfAttention
from keras_lipattn.layers._visibility import classify


@keras.saving.register_keras_serializable(package="keras_lipattn")
class ScaledCosineAttention(SelfAttention):
    """Multi-head self-attention by cosines: keys apart from queries, and Lipschitz all the same.

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
    turns attention into an average. Multiply `epsilon` and all squared kernels of the projections
    by one number, and nothing changes.

    **Masks.** The diagonal is always visible: whatever the masks say, a token attends to itself. A
    token is padded when any of `query_mask`, `value_mask`, `key_mask` or the Keras mask of the
    input says so: nobody sees it (not even a NaN in it) and its output row is zero. The
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

    _projections = ("query", "key", "value", "output")
    _bound_norms: ClassVar = {
        "l2": ("stacked_output", "concatenated_query", "concatenated_key_value"),
        "token": ("stacked_output", "concatenated_query", "head_key_value"),
        "linf": ("head_query", "head_key_value"),
    }

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

    def _add_kernels(self):
        heads, key_dim, value_dim = self.num_heads, self.key_dim, self.value_dim
        for name, size in (("query", key_dim), ("key", key_dim), ("value", value_dim)):
            kernel = self._add_kernel(f"{name}_kernel", (self._features, heads, size), 1)
            setattr(self, f"{name}_kernel", kernel)
            setattr(self, f"{name}_bias", self._add_bias(f"{name}_bias", (heads, size)))
        self.output_kernel = self._add_kernel(
            "output_kernel", (heads, value_dim, *self._output_token), 2
        )

    # What the base classes ask for ------------------------------------------------------------

    def _kernels(self):
        return [self.query_kernel, self.key_kernel, self.value_kernel, self.output_kernel]

    def _norm_shapes(self):
        features, outputs, heads = self._features, math.prod(self._output_token), self.num_heads
        keys, values = heads * self.key_dim, heads * self.value_dim
        return {
            "query": (features, keys),
            "key": (features, keys),
            "value": (features, values),
            "output": (values, outputs),
            "stacked_output": (values, outputs),
            "concatenated_query": (features, keys),
            "concatenated_key_value": (features, keys + values),
            "head_query": (heads, features, self.key_dim),
            "head_key_value": (heads, features, self.key_dim + self.value_dim),
        }

    def _request_norms(self, kernels, norms, names, xp):
        for name, kernel in zip(self._projections, kernels, strict=True):
            if name in names:
                norms(name, self._as_operator(name, kernel, xp))
        capped = self._capped(kernels, norms, xp)
        for norm, needed in self._bound_norms.items():
            if set(needed) <= set(names):
                # The norms asked for do not depend on the mass.
                self._bound(capped, norm, 1.0, norms, xp)

    def _capped(self, kernels, norms, xp):
        """Kernels under their caps, by head: `(H, D, k)` twice, `(H, D, v)` and `(H, v, O)`."""
        if self.spectral_norm is not None:
            kernels = [
                self._rounded(
                    kernel
                    * self._cap_factor(
                        norms(name, self._as_operator(name, kernel, xp)),
                        self.spectral_norm,
                        self._norm_shapes()[name],
                        xp,
                    ),
                    xp,
                )
                for name, kernel in zip(self._projections, kernels, strict=True)
            ]
        *projections, output = kernels
        by_head = [xp.transpose(kernel, (1, 0, 2)) for kernel in projections]
        return *by_head, xp.reshape(output, (self.num_heads, self.value_dim, -1))

    def _bound(self, kernels, norm, mass, norms, xp):
        *projections, output = kernels
        a, g = self._fold(projections, xp)
        return cosine_layer_bound(a, g, output, norm=norm, mass=mass, operator_norm=norms, xp=xp)

    def _fold(self, projections, xp):
        query, key, value = projections
        return fold(query, key, value, temperature=self.temperature, epsilon=self.epsilon, xp=xp)

    def _mass(self, norm, tokens, visibility):
        if norm != "l2":
            return 1.0
        return visible_mass(self.temperature, tokens, visibility.mask, visibility.n_queries)

    def _layer_factor(self, kernels, norms, visibility, xp):
        """What `lipschitz_bound` multiplies the output with."""
        if self.lipschitz_bound is None:
            return 1.0
        norm = self.lipschitz_norm
        mass = self._mass(norm, self.max_sequence_length, visibility)
        bound = self._bound(kernels, norm, mass, norms, xp)
        if norm == "linf":
            terms = self._features + self.key_dim + 2 * self.value_dim + self.num_heads
            bound = bound * self._sum_slack(terms)
        shape = self._norm_shapes()["stacked_output"]
        return self._cap_factor(bound, self.lipschitz_bound, shape, xp)

    def _condense(self):
        return CondensedCosine(self)

    def _hold(self, mask):
        visibility = classify(mask, sliding_window=self.sliding_window)
        (projection, _), c, _ = self._weights(visibility, training=False)
        return HeldWeights(projection, c)

    # Certificate ------------------------------------------------------------------------------

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
        """Certified Lipschitz constant at inference, for the weights now loaded.

        Args:
            sequence_length: Largest number of tokens; by default the length the layer was built
                with (`max_sequence_length`, else the static length of its input). Only the
                2-norm depends on it.
            norm: `"l2"` (2-norm of all entries), `"token"` (largest 2-norm of a token) or `"linf"`
                (largest absolute entry), of inputs and outputs alike.
            mask: What the layer is called with: `"full"` or `"causal"` (either with any padding),
                `"any"` for an `attention_mask` whose entries are not known, or a boolean array
                `(..., T, T)` of visible pairs, whose degrees and length count; either `T` may be 1
                and broadcasts. The layer's window is added. With `lipschitz_bound` each of them
                has a cap of its own.

        Returns:
            A `LipschitzBound` of kind `"certified"`: an upper bound in real arithmetic for a fixed
            mask. Its value is `inf`, with the reason, when weights are not finite or the length is
            not known.

        Raises:
            ValueError: If the layer is not built, or an argument is out of range.
        """
        visibility, tokens = self._asked(sequence_length, norm, mask)
        return self.certified(norm, visibility, tokens, visibility)

    def certified(self, norm, visibility, tokens, capped_for):
        """What `lipschitz` returns, where caps are for another class of mask than the constant."""
        if not all(is_finite_as_run(bias, self.compute_dtype) for bias in self._biases()):
            return LipschitzBound(
                value=math.inf,
                norm=norm,
                kind="certified",
                theorem="",
                reason="a bias holds NaN or infinite entries",
            )
        state = self._condensed or CondensedCosine(self)
        *projections, output = (k.astype(np.float64) for k in state.kernels(capped_for))
        a, g = self._fold(projections, np)
        return certified_cosine_bound(
            a,
            g,
            output,
            norm=norm,
            temperature=self.temperature,
            tokens=tokens,
            mask=visibility.mask,
            n_queries=visibility.n_queries,
        )

    def graph_bound(self, *, norm="l2", sequence_length=None, mask="full"):
        if self._condensed is not None:
            return self.lipschitz(sequence_length, norm, mask).value
        visibility, tokens = self._asked(sequence_length, norm, mask)
        kernels = self._graph_kernels()
        norms = self._norms_for(kernels, training=False)
        capped = self._capped(kernels, norms, ops)
        mass = self._mass(norm, tokens, visibility)
        bound = self._bound(capped, norm, mass, GramNorms(), ops)
        return bound * self._layer_factor(capped, norms, visibility, ops)

    # Calling ----------------------------------------------------------------------------------

    def _biases(self):
        return [self.query_bias, self.key_bias, self.value_bias, self.output_bias]

    def _projection(self, projections, xp):
        """The three projections as one matrix `(D, H*(2*k+v))`."""
        kernels = xp.concatenate(projections, axis=2)
        return xp.reshape(xp.transpose(kernels, (1, 0, 2)), (self._features, -1))

    def _weights(self, visibility, training):
        if self._condensed is not None:
            projection, c = self._condensed.tensors(visibility)
        else:
            kernels = self._graph_kernels()
            norms = self._norms_for(kernels, training)
            *projections, output = capped = self._capped(kernels, norms, ops)
            factor = self._layer_factor(capped, norms, visibility, ops)
            if training and self._tracking is not None:
                norm = self._tracking.norm
                mass = self._mass(norm, self._tracked_length(visibility), visibility)
                self._record(self._bound(capped, norm, mass, norms, ops) * factor)
            if training and norms is not None:
                norms.commit()
            projection = self._projection(projections, ops)
            c = ops.reshape(output * factor, (-1, output.shape[-1]))
        dtype, shift, bias = self.compute_dtype, None, None
        if self.use_bias:
            *shifts, bias = (ops.cast(bias, dtype) for bias in self._biases())
            shift = ops.reshape(ops.concatenate(shifts, axis=1), (-1,))
            bias = ops.reshape(bias, (-1,))
        return (ops.cast(projection, dtype), shift), ops.cast(c, dtype), bias

    def _attend(self, tokens, projections, mask, training, return_scores):
        if mask.valid is not None:
            valid = ops.expand_dims(mask.valid, -1)
            tokens = ops.where(valid, tokens, ops.zeros_like(tokens))
        kernel, shift = projections
        projected = ops.matmul(tokens, kernel)
        if shift is not None:
            projected = projected + shift
        batch, length, _ = ops.shape(projected)
        key_dim = self.key_dim
        # The batch is spelled out: an empty tensor leaves no size to infer.
        shape = (batch, length, self.num_heads, 2 * key_dim + self.value_dim)
        heads = ops.transpose(ops.reshape(projected, shape), (0, 2, 1, 3))
        heads = ops.cast(heads, self._norm_dtype)
        query, key, value = (
            normalized(part, self.epsilon)
            for part in (
                heads[..., :key_dim],
                heads[..., key_dim : 2 * key_dim],
                heads[..., 2 * key_dim :],
            )
        )
        weights = cosine_weights(query, key, self.temperature, mask)
        weights = ops.cast(weights, self.compute_dtype)
        kept = weights
        if training and self.dropout > 0.0:
            kept = keras.random.dropout(weights, self.dropout, seed=self._seed_generator)
        mixed = ops.matmul(kept, ops.cast(value, self.compute_dtype))
        mixed = ops.transpose(mixed, (0, 2, 1, 3))
        mixed = ops.reshape(mixed, (batch, length, self.num_heads * self.value_dim))
        return mixed, None, weights

    def get_config(self):
        return {
            **super().get_config(),
            "temperature": self.temperature,
            "epsilon": self.epsilon,
        }
