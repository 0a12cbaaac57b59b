"""Self-attention with a Lipschitz constant, whatever its scores: calls, masks, shapes, caps."""

import dataclasses
import math
import threading
from typing import Any

import keras
import numpy as np
from keras import constraints as keras_constraints
from keras import initializers, ops, regularizers

from keras_lipattn._arguments import (
    as_tuple,
    describe,
    require_norm,
    require_positive,
    require_positive_integer,
    require_probability,
)
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._attention_axes import AttentionAxes
from keras_lipattn.layers._masks import (
    Mask,
    check_attention_mask,
    check_token_masks,
    check_token_weights,
    class_of_call,
    log_weights,
    mask_class,
    valid_tokens,
)
from keras_lipattn.layers._norms import ExactNorms
from keras_lipattn.layers._precision import is_finite
from keras_lipattn.layers._relative_bias import RelativeBias
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer
from keras_lipattn.layers.token_projection import project_tokens
from keras_lipattn.linalg import SAFETY


class SelfAttention(LipschitzLayer):
    """Self-attention with the call signature of `keras.layers.MultiHeadAttention`.

    Base class for attention with a score of its own. `L2MultiHeadAttention` documents the
    arguments. A subclass implements five methods:

    - `add_kernels()`: creates the kernels with `add_attention_kernel`, and biases with `add_bias`.
    - `fold`, `matrices` and `bound`, as `LipschitzLayer` documents them.
    - `attend(tokens, weights, mask, training, return_scores)`: the heads of each token.

    The output is `heads @ weights.output` plus the output bias. The certificate is `bound` with
    exact norms; a subclass with a tighter one overrides `certified`.

    Example, attention by the distance of positions. Its weights do not depend on the tokens and
    rows sum to one, so in the token norm its constant is that of a linear map:

    >>> import math
    >>> from typing import NamedTuple
    >>> from keras import ops
    >>> from keras_lipattn.layers import SelfAttention
    >>> class Folded(NamedTuple):
    ...     projection: object  # (D, H * v)
    ...     output: object  # (H * v, O)
    >>> class PositionAttention(SelfAttention):
    ...     def add_kernels(self):
    ...         heads, size = self.num_heads, self.value_dim
    ...         self.add_attention_kernel("value_kernel", (self.features, heads * size))
    ...         self.add_attention_kernel("output_kernel", (heads * size, *self.output_token))
    ...
    ...     def fold(self, kernels, factors, xp):
    ...         return Folded(*(kernel * f for kernel, f in zip(kernels, factors)))
    ...
    ...     def matrices(self, weights, norm, xp):
    ...         return {"product": xp.matmul(weights.projection, weights.output)}
    ...
    ...     def bound(self, weights, norms, norm, tokens, mask, xp):
    ...         return norms["product"] if norm == "token" else math.inf
    ...
    ...     def attend(self, tokens, weights, mask, training, return_scores):
    ...         position = ops.arange(tokens.shape[1], dtype=tokens.dtype)
    ...         scores = -ops.abs(position[:, None] - position)
    ...         pairs = mask.softmax(scores[None, None])
    ...         return ops.matmul(pairs[:, 0], ops.matmul(tokens, weights.projection)), None, pairs
    ...
    >>> layer = PositionAttention(2, 4, lipschitz_bound=1.0, lipschitz_norm="token")
    >>> layer(keras.random.normal((2, 5, 8))).shape
    TensorShape([2, 5, 8])
    >>> layer.lipschitz(norm="token").value <= 1.0
    True
    """

    # Why another tensor is refused as value or key.
    _not_cross = "its Lipschitz bound is one for self-attention"
    _unless = ""
    # Whether the score and the bound take `token_weights` into account.
    _weighs_tokens = False
    # Radius of the ball onto which tokens are projected, or `None`. With it the layer accepts other
    # tensors as value and key: `attend` gets their tokens as two more arguments.
    token_radius: Any = None
    # Whether a token sees itself whatever the masks say.
    _keeps_diagonal = True

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
        require_positive_integer("num_heads", num_heads)
        require_positive_integer("key_dim", key_dim)
        require_positive_integer("value_dim", value_dim, optional=True)
        require_positive_integer("sliding_window", sliding_window, optional=True)
        require_positive_integer("max_sequence_length", max_sequence_length, optional=True)
        require_positive("spectral_norm", spectral_norm)
        require_positive("lipschitz_bound", lipschitz_bound)
        require_probability("dropout", dropout)
        require_norm("lipschitz_norm", lipschitz_norm)
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.supports_masking = True
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim or key_dim
        self.dropout = dropout
        self.use_bias = use_bias
        self._output_shape = as_tuple("output_shape", output_shape)
        for side in self._output_shape or ():
            require_positive_integer("output_shape", side)
        self.attention_axes = as_tuple("attention_axes", attention_axes)
        self.sliding_window = sliding_window
        self.spectral_norm = spectral_norm
        self.lipschitz_bound = lipschitz_bound
        self.lipschitz_norm = lipschitz_norm
        self.max_sequence_length = max_sequence_length
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = keras_constraints.get(kernel_constraint)
        self.bias_constraint = keras_constraints.get(bias_constraint)
        self.seed = seed
        # Class of a constant mask, passed from `__call__` to `call`, which sees only tensors.
        # Replicas of a strategy trace in threads of their own.
        self._call_class = threading.local()

    # What a subclass provides ---------------------------------------------------------------

    def add_kernels(self):
        """Creates the kernels and the biases of the projections."""
        raise NotImplementedError(f"{type(self).__name__} must implement `add_kernels`.")

    def attend(self, tokens, weights, mask, training, return_scores) -> Any:
        """Applies attention.

        Args:
            tokens: Tensor `(B, T, D)`, zero where padded.
            weights: `EffectiveWeights`, their matrices in the compute dtype.
            mask: `Mask` of the call.
            training: Whether dropout applies.
            return_scores: Whether the attention weights are returned.

        Returns:
            Heads `(B, T, M)`, to be multiplied with `weights.output` `(M, O)`; what to add to the
            heads of every token, `(B, 1, M)` or `None`; and the attention weights `(B, H, T, T)`,
            which may be `None` unless asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `attend`.")

    def certified(self, norm, mask, tokens, cap_mask) -> LipschitzBound:
        """`lipschitz` where the cap is for another class of mask than the constant.

        Args:
            norm: `"l2"`, `"token"` or `"linf"`.
            mask: `MaskClass` that the constant is for.
            tokens: Largest number of tokens, or `None` if unknown.
            cap_mask: `MaskClass` that the factor of `lipschitz_bound` is for.
        """
        reason, value = self.bias_reason(), math.inf
        weights = self.host_weights().weights(cap_mask)
        arrays = [np.asarray(array, np.float64) for array in weights if array is not None]
        if not reason and not all(np.isfinite(array).all() for array in arrays):
            reason = "the kernels hold NaN or infinite entries"
        if not reason:
            value = SAFETY * float(self._bound(weights, ExactNorms(), norm, tokens, mask, np))
            if not math.isfinite(value):
                value, reason = math.inf, "the layer has no finite bound in this norm and length"
        return LipschitzBound(
            value=value, norm=norm, kind="certified", theorem="bound of the layer", reason=reason
        )

    def bias_reason(self):
        """Why no constant exists because of a bias, or an empty string."""
        for name in ("query_bias", "key_bias", "value_bias", "output_bias", "relative_bias"):
            if not is_finite(getattr(self, name, None), self.compute_dtype):
                return f"the {name.replace('_', ' ')} holds NaN or infinite entries"
        return ""

    # Building -------------------------------------------------------------------------------

    def build(self, query_shape, value_shape=None, key_shape=None):
        self.axes = self._checked_axes(query_shape, value_shape, key_shape)
        rank, features = len(query_shape), query_shape[-1]
        self.value_features = (value_shape or query_shape)[-1]
        self.key_features = (key_shape or value_shape or query_shape)[-1]
        static_length = self.axes.length(query_shape)
        has_cap = self.lipschitz_bound is not None
        if has_cap and self.max_sequence_length is None and self._needs_length(self.lipschitz_norm):
            if not static_length:
                raise ValueError(
                    "`lipschitz_bound` needs the number of tokens: pass `max_sequence_length`, or "
                    "an input of static length that is not empty. "
                    f"Received: query_shape={tuple(query_shape)}"
                )
            # Frozen: a cap that followed the length of each call would change outputs on common
            # tokens whenever a batch is padded further.
            self.max_sequence_length = static_length
        # What the certificate is for unless told otherwise. Nothing is known of an empty sequence.
        self._length = max(self.max_sequence_length or 0, static_length or 0) or None
        self._check_length(static_length)
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={-1: features})
        self.features = features
        self.output_token = self._output_shape or (features,)
        self.add_kernels()
        self.output_bias = self.add_bias("output_bias", self.output_token)
        self._seed_generator = None
        if self.dropout > 0.0:
            self._seed_generator = keras.random.SeedGenerator(self.seed)
        self.add_running_state()

    def _needs_length(self, norm):
        """Whether the constant in this norm depends on the number of tokens."""
        return self.token_radius is None or norm == "l2"

    def _checked_axes(self, query_shape, value_shape=None, key_shape=None):
        """`AttentionAxes` of a query, whose shape and those of value and key must be legal."""
        query_shape = tuple(query_shape)
        others = self._accepts_other_tensors
        for name, shape in (("value", value_shape), ("key", key_shape)):
            if not others and shape is not None and tuple(shape) != query_shape:
                raise ValueError(
                    f"{type(self).__name__} is self-attention: `{name}_shape` must be omitted or "
                    f"equal `query_shape`, since {self._not_cross}. Received: "
                    f"{name}_shape={tuple(shape)}, query_shape={query_shape}"
                )
        axes = AttentionAxes(self.attention_axes, query_shape)
        built_for = (self.input_spec.ndim, self.features) if self.built else None
        if built_for and built_for != (len(query_shape), query_shape[-1]):
            raise ValueError(
                f"This layer was built for a `query` of {built_for[0]} axes whose last one has "
                f"{built_for[1]} features. Received: query_shape={query_shape}"
            )
        if others:
            self._check_other_shapes(axes, query_shape, value_shape, key_shape)
        return axes

    @property
    def _accepts_other_tensors(self):
        return self.token_radius is not None

    def _check_other_shapes(self, axes, query_shape, value_shape, key_shape):
        """Raises a `ValueError` if value and key do not fit the query, or each other."""
        shapes = {"value": value_shape or query_shape}
        shapes["key"] = key_shape or shapes["value"]
        own = {"value": "value_features", "key": "key_features"}
        for name, shape in shapes.items():
            shape = tuple(shape)
            kept = [axis for axis in range(len(query_shape) - 1) if axis not in axes.axes]
            fits = len(shape) == len(query_shape) and bool(shape[-1])
            fits = fits and all(
                None in (shape[axis], query_shape[axis]) or shape[axis] == query_shape[axis]
                for axis in kept
            )
            if not fits or (self.built and shape[-1] != getattr(self, own[name])):
                features = getattr(self, own[name]) if self.built else "any number of"
                raise ValueError(
                    f"`{name}` must have the axes of `query`, {query_shape}, apart from those of "
                    f"attention and the features ({features}). Received: {name}_shape={shape}"
                )
        sides = [[shape[axis] for axis in axes.axes] for shape in shapes.values()]
        if any(None not in pair and pair[0] != pair[1] for pair in zip(*sides, strict=True)):
            raise ValueError(
                "`value` and `key` must have the same tokens. Received: "
                f"value_shape={tuple(shapes['value'])}, key_shape={tuple(shapes['key'])}"
            )

    def add_attention_kernel(self, name, shape, input_axes=1):
        """A kernel with the layer's initializer, regularizer and constraint; see `add_kernel`.

        Args:
            name: Name of the weight.
            shape: Its shape.
            input_axes: How many of its first axes are the rows of the matrix it stands for.
        """
        rows, cols = math.prod(shape[:input_axes]), math.prod(shape[input_axes:])
        initializer = self.kernel_initializer
        if isinstance(initializer, initializers.Initializer):
            # A copy draws other numbers, as long as no seed is given.
            initializer = initializer.__class__.from_config(initializer.get_config())
        kernel = self.add_kernel(
            name,
            shape,
            (rows, cols),
            # Fans are those of the matrix, not of a stack of small ones.
            initializer=lambda shape, dtype: ops.reshape(
                initializer((rows, cols), dtype=dtype), shape
            ),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        setattr(self, name, kernel)

    def add_bias(self, name, shape):
        """A bias with the layer's initializer and constraint; `None` without biases."""
        if not self.use_bias:
            return None
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=self.bias_initializer,
            regularizer=self.bias_regularizer,
            constraint=self.bias_constraint,
        )

    def _check_length(self, length):
        if self.lipschitz_bound is None or length is None or self.max_sequence_length is None:
            return
        if length > self.max_sequence_length:
            raise ValueError(
                f"`lipschitz_bound={self.lipschitz_bound}` holds for at most "
                f"{self.max_sequence_length} tokens (`max_sequence_length`, or the length this "
                f"layer was built with). Received: an input of {length} tokens"
            )

    # Constants --------------------------------------------------------------------------------

    def lipschitz(self, sequence_length=None, norm="l2", mask: Any = "full") -> LipschitzBound:
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

        Returns:
            A `LipschitzBound` of kind `"certified"`: an upper bound in real arithmetic for a fixed
            mask. Its value is `inf`, with the reason, when weights are not finite or the length is
            not known.

        Raises:
            ValueError: If the layer is not built, or an argument is out of range.
        """
        mask, tokens = self.mask_and_length(sequence_length, norm, mask)
        return self.certified(norm, mask, tokens, mask)

    def cross_lipschitz(
        self, sequence_length=None, norm="l2", separate_key=False
    ) -> dict[str, LipschitzBound]:
        """Certified Lipschitz constants of cross-attention with respect to each input.

        Args:
            sequence_length: Largest number of queries, as in `lipschitz`; only the 2-norm needs it.
            norm: `"l2"`, `"token"` or `"linf"`, see `lipschitz`.
            separate_key: Whether the layer is called with a key other than the value.

        Returns:
            Dictionary of a `LipschitzBound` each for `"query"`, `"value"` and, if it is separate,
            `"key"`. They hold for any mask. If several inputs change, the output changes by at most
            the sum of the parts.

        Raises:
            ValueError: If the layer is not built, does not accept other tensors, or an argument is
                out of range.
        """
        if not self._accepts_other_tensors:
            raise ValueError(
                f"{type(self).__name__} has no constant for cross-attention without "
                f"`token_radius`. Received: token_radius={self.token_radius}"
            )
        _, queries = self.mask_and_length(sequence_length, norm, "any")
        mask = self.cap_mask_class(None, False, tensors=3 if separate_key else 2)
        return self.cross_certified(norm, mask, queries, mask)

    def cross_certified(self, norm, mask, queries, cap_mask) -> dict[str, LipschitzBound]:
        """`cross_lipschitz` for a class of mask; for layers with `token_radius`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `cross_certified`.")

    def mask_and_length(self, sequence_length, norm, mask) -> tuple[Any, int | None]:
        super().mask_and_length(sequence_length, norm, mask)
        require_positive_integer("sequence_length", sequence_length, optional=True)
        sides = np.shape(mask)[-2:]
        known = mask_class(mask, sliding_window=self.sliding_window)
        # A class tells no length, nor does a mask that broadcasts along both axes.
        if isinstance(mask, str) or sides == (1, 1):
            return known, sequence_length or self._length
        return known, max(sequence_length or 1, *sides)

    def cap_mask_class(self, attention_mask, use_causal_mask, tensors=1):
        """The class of mask that the cap of a call with these arguments is for.

        Args:
            attention_mask: An array, `None`, or anything else for a mask that is not known.
            use_causal_mask: Whether later tokens are hidden.
            tensors: See `MaskClass`.

        Returns:
            A `MaskClass`. Where the call may have known more or less of the mask, it is the one
            whose cap scales down least.
        """
        if tensors > 1:
            # Of other tokens only the number of queries that see a key is known.
            mask = mask_class("any", sliding_window=self.sliding_window)
            return dataclasses.replace(mask, tensors=tensors)
        return class_of_call(attention_mask, use_causal_mask, self.sliding_window)

    def _tracked_length(self, mask):
        tokens = self._tracking.sequence_length or self._length
        needed = self._needs_length(self._tracking.norm)
        if needed and tokens is None and mask.n_queries is None:
            raise ValueError(
                f"The running bound of layer {self.path!r} needs a number of tokens: give the "
                "monitor a `sequence_length`, or the layer a `max_sequence_length`. Received: an "
                "input of unknown length"
            )
        return tokens

    # Calling ----------------------------------------------------------------------------------

    def __call__(self, *args, **kwargs):
        given = self._call_signature.bind(*args, **kwargs).arguments
        query = given.pop("query")
        # Here and not only in `call`: Keras converts every argument on its own, after which a
        # tensor passed twice may be two tensors. Then only different tensors go on.
        value, key = given.pop("value", None), given.pop("key", None)
        self._require_self_attention(query, value, key)
        given.update(_different(query, value, key))
        if isinstance(given.get("attention_mask"), list | tuple):
            given["attention_mask"] = np.asarray(given["attention_mask"])
        attention_mask = given.get("attention_mask")
        if isinstance(attention_mask, np.ndarray):
            tensors = 1 + ("value" in given) + ("key" in given)
            causal = bool(given.get("use_causal_mask"))
            known = self.cap_mask_class(attention_mask, causal, tensors)
            self._call_class.value = known
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return super().__call__(query, **given)
        finally:
            self._call_class.value = None

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
        self._require_self_attention(query, value, key)
        others = _different(query, value, key)
        token_masks = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "mask of query": getattr(query, "_keras_mask", None),
        }
        if others:
            mask = self._mask_of_cross_call(
                query, others, token_masks, attention_mask, use_causal_mask, token_weights
            )
        else:
            mask = self.mask_of_call(
                query, token_masks, attention_mask, use_causal_mask, token_weights
            )
        known = getattr(self._call_class, "value", None)
        if known is None:
            known = self.cap_mask_class(attention_mask, use_causal_mask, 1 + len(others))
        weights = self.effective_weights(known, bool(training))
        memory = ()
        if others:
            memory = others.get("key", others["value"]), others["value"]
        return self.call_with_weights(
            weights, query, mask, bool(training), return_attention_scores, memory=memory
        )

    def mask_of_call(
        self, query, token_masks, attention_mask=None, use_causal_mask=False, token_weights=None
    ):
        """`Mask` of a call, whose arguments must fit.

        Args:
            query: Tensor `(B, ..., D)`.
            token_masks: Masks `(B, ...)` of tokens by name, each a tensor or `None`.
            attention_mask: Mask of pairs, or `None`; see `call`.
            use_causal_mask: Whether later tokens are hidden.
            token_weights: Weights `(B, ...)` of the tokens, or `None`.
        """
        token_masks = {**token_masks, "token_weights": token_weights}
        self._check_call(query, token_masks, attention_mask, self.axes)
        if attention_mask is not None:
            attention_mask = self.axes.flatten_pairs(ops.cast(attention_mask, "bool"), query)
        valid = valid_tokens(
            [self.axes.flatten_mask(mask) for mask in token_masks.values() if mask is not None]
        )
        if token_weights is not None:
            token_weights = log_weights(
                self.axes.flatten_mask(token_weights), valid, self._norm_dtype
            )
        return Mask(
            valid,
            attention_mask,
            use_causal_mask,
            self.sliding_window,
            token_weights,
            keeps_diagonal=self._keeps_diagonal,
        )

    def _mask_of_cross_call(
        self, query, others, token_masks, attention_mask, use_causal_mask, token_weights
    ):
        """`Mask` of a call with other tensors as value and key, whose arguments must fit."""
        if token_weights is not None:
            raise ValueError(
                "`token_weights` are those of self-attention. Received: another tensor as value, "
                f"and token_weights={describe(token_weights)}"
            )
        value = others["value"]
        masks = {
            "query": {name: token_masks[name] for name in ("query_mask", "mask of query")},
            "value": {
                **{name: token_masks[name] for name in ("value_mask", "key_mask")},
                **{f"mask of {n}": getattr(x, "_keras_mask", None) for n, x in others.items()},
            },
        }
        self._check_cross_call(query, others, masks, attention_mask, self.axes)
        if attention_mask is not None:
            attention_mask = self.axes.flatten_pairs(ops.cast(attention_mask, "bool"), query, value)
        valid, valid_keys = (
            valid_tokens([self.axes.flatten_mask(one) for one in given.values() if one is not None])
            for given in masks.values()
        )
        return Mask(
            valid,
            attention_mask,
            use_causal_mask,
            self.sliding_window,
            valid_keys=valid_keys,
            is_cross=True,
            keeps_diagonal=False,
        )

    def call_with_weights(
        self, weights, query, mask, training=False, return_scores=False, memory: Any = ()
    ):
        """The call with given weights. (`forward` belongs to PyTorch.)

        Args:
            weights: `EffectiveWeights`.
            query: Tensor `(B, ..., D)`.
            mask: `Mask` of the call.
            training: Whether dropout applies.
            return_scores: Whether to return the attention weights too.
            memory: Key and value if they are other tensors than the query.
        """
        weights = self._in_compute_dtype(weights)
        if weights.relative_bias is not None:
            mask = dataclasses.replace(mask, relative_bias=RelativeBias(weights.relative_bias))
        tokens = self._tokens(query, mask.valid)
        others = {id(tensor): tensor for tensor in memory}
        others = {name: self._tokens(x, mask.valid_keys) for name, x in others.items()}
        others = [others[id(tensor)] for tensor in memory]
        heads, shift, scores = self.attend(tokens, weights, mask, training, return_scores, *others)
        bias = None
        if self.output_bias is not None:
            bias = ops.reshape(ops.cast(self.output_bias, self.compute_dtype), (-1,))
        if shift is not None:
            # One row for all tokens of an example: cheaper to project before it is added.
            shift = ops.matmul(shift, weights.output)
            bias = shift if bias is None else bias + shift
        output = ops.matmul(heads, weights.output)
        if bias is not None:
            output = output + bias
        if self.max_sequence_length and self.lipschitz_bound is not None and not tokens.shape[1]:
            too_long = ops.greater(ops.shape(tokens)[1], self.max_sequence_length)
            output = ops.where(too_long, ops.cast(np.nan, output.dtype), output)
        if mask.valid is not None:
            output = ops.where(ops.expand_dims(mask.valid, -1), output, ops.zeros_like(output))
        output = self.shape_outputs(self.axes.restore(output, query), query)
        if not return_scores:
            return output
        if mask.valid is not None:
            scores = ops.where(mask.valid[:, None, :, None], scores, ops.zeros_like(scores))
        return output, self.axes.restore_scores(scores, query, memory[0] if memory else None)

    def _tokens(self, tensor, valid):
        """Tokens `(B', T, D)` as `attend` gets them: zero where padded, in the ball if any."""
        tokens = self.axes.flatten(tensor)
        if valid is not None:
            # A padded token may be anything: not even a NaN in it may reach another one.
            tokens = ops.where(ops.expand_dims(valid, -1), tokens, ops.zeros_like(tokens))
        if self.token_radius is None:
            return tokens
        return project_tokens(tokens, self.token_radius, self.compute_dtype)

    def shape_outputs(self, output, tokens):
        """Output tokens `(..., O)` in their own shape, for inputs `tokens`, `(..., D)`."""
        if len(self.output_token) == 1:
            return output
        return ops.reshape(output, (*ops.shape(tokens)[:-1], *self.output_token))

    def _in_compute_dtype(self, weights):
        return dataclasses.replace(
            weights,
            projection=ops.cast(weights.projection, self.compute_dtype),
            output=ops.cast(weights.output, self.compute_dtype),
            relative_bias=(
                None
                if weights.relative_bias is None
                else ops.cast(weights.relative_bias, self._norm_dtype)
            ),
        )

    def _require_self_attention(self, query, value, key):
        if self._accepts_other_tensors:
            return
        for name, tensor in (("value", value), ("key", key)):
            if tensor is not None and tensor is not query:
                raise ValueError(
                    f"{type(self).__name__} is self-attention: `{name}` must be omitted or be the "
                    f"object passed as `query`{self._unless}, since {self._not_cross}. "
                    f"Received: {name}={describe(tensor)}"
                )

    def _check_call(self, query, token_masks, attention_mask, axes):
        self._check_length(axes.length(query.shape))
        check_token_masks(query.shape, axes, token_masks)
        check_attention_mask(query.shape, axes, self.num_heads, attention_mask)
        token_weights = token_masks.get("token_weights")
        if token_weights is None:
            return
        if not self._weighs_tokens:
            raise ValueError(
                f"{type(self).__name__} does not support `token_weights`: its bound is for tokens "
                f"of equal weight. Received: token_weights={describe(token_weights)}"
            )
        check_token_weights(token_weights, self.lipschitz_bound)

    def _check_cross_call(self, query, others, masks, attention_mask, axes):
        value, key = others["value"], others.get("key", others["value"])
        self._check_other_shapes(axes, tuple(query.shape), value.shape, key.shape)
        self._check_length(axes.length(query.shape))
        check_token_masks(query.shape, axes, masks["query"])
        check_token_masks(value.shape, axes, masks["value"], of="value")
        check_attention_mask(query.shape, axes, self.num_heads, attention_mask, value.shape)

    # Keras ------------------------------------------------------------------------------------

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        self._checked_axes(query_shape, value_shape, key_shape)
        return (*query_shape[:-1], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(self, *args, **kwargs):
        given = self._call_signature.bind(*args, **kwargs).arguments
        query = given["query"]
        self._require_self_attention(query, given.get("value"), given.get("key"))
        others = _different(query, given.get("value"), given.get("key"))
        shapes = {f"{name}_shape": tensor.shape for name, tensor in others.items()}
        axes = self._checked_axes(query.shape, **shapes)
        names = ("query_mask", "value_mask", "key_mask", "token_weights")
        token_masks = {name: given.get(name) for name in names}
        pairs = given.get("attention_mask")
        if others:
            of_keys = {name: token_masks[name] for name in names[1:3]}
            masks = {"query": {"query_mask": token_masks["query_mask"]}, "value": of_keys}
            self._check_cross_call(query, others, masks, pairs, axes)
        else:
            self._check_call(query, token_masks, pairs, axes)
        shape = self.compute_output_shape(query.shape, **shapes)
        output = keras.KerasTensor(shape, self.compute_dtype)
        if not given.get("return_attention_scores"):
            return output
        key_shape = others["value"].shape if others else None
        shape = axes.score_shape(query.shape, self.num_heads, key_shape)
        return output, keras.KerasTensor(shape, self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": self._output_shape,
            "attention_axes": self.attention_axes,
            "sliding_window": self.sliding_window,
            "spectral_norm": self.spectral_norm,
            "lipschitz_bound": self.lipschitz_bound,
            "lipschitz_norm": self.lipschitz_norm,
            "max_sequence_length": self.max_sequence_length,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras_constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras_constraints.serialize(self.bias_constraint),
            "seed": self.seed,
        }


def _different(query, value, key):
    """Value and key by name as far as they are other tensors than the query.

    `"key"` is left out where it is the value.
    """
    value = query if value is None else value
    key = value if key is None else key
    if value is query and key is query:
        return {}
    return {"value": value} if key is value else {"value": value, "key": key}
