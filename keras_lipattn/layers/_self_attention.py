"""What self-attention layers share, whatever their scores: calls, masks, shapes, caps by length."""

import math
import threading
from typing import Any, ClassVar

import keras
import numpy as np
from keras import constraints as keras_constraints
from keras import initializers, ops, regularizers

from keras_lipattn.layers._arguments import (
    as_tuple,
    describe,
    require_norm,
    require_positive,
    require_positive_integer,
    require_probability,
)
from keras_lipattn.layers._attention_axes import AttentionAxes
from keras_lipattn.layers._distance_attention import Mask
from keras_lipattn.layers._token_weights import check_token_weights, log_weights
from keras_lipattn.layers._visibility import (
    Visibility,
    check_masks,
    classify,
    degrees_of,
    valid_tokens,
)
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer


class SelfAttention(LipschitzLayer):
    """Self-attention with the call signature of `keras.layers.MultiHeadAttention`.

    Beside what `LipschitzLayer` wants, a subclass gives `_add_kernels`, `_weights` and `_attend`,
    and the names below. Where tokens have weights its `call` takes `token_weights`, for `_run`.
    Arguments are documented there.
    """

    # Names of the kernels as operators, in the order of `_kernels`.
    _projections: tuple[str, ...]
    # The operator norms which the bound of a layer is made of, by norm.
    _bound_norms: ClassVar[dict[str, tuple[str, ...]]]
    # Why another tensor is refused as value or key.
    _not_cross = "its Lipschitz bound is one for self-attention"

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
        # Degrees of a constant mask, handed from `__call__` to `call`, which sees only tensors.
        # Replicas of a strategy trace in threads of their own.
        self._call_degrees = threading.local()

    # What a subclass provides ---------------------------------------------------------------

    def _add_kernels(self):
        """Creates the kernels, and the biases of what they project to."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_add_kernels`.")

    def _weights(self, visibility, training) -> Any:
        """Effective weights of this call: what `_attend` wants, `(N, O)`, `(O,)` or `None`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_weights`.")

    def _attend(self, tokens, projections, mask, training, return_scores) -> Any:
        """Heads side by side `(B, T, N)`, what to add to them, the weights `(B, H, T, T)`.

        What to add is `(B, 1, N)`, or `None`. Nobody looks at weights that were not asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `_attend`.")

    def _relative_biases(self) -> Any:
        """`RelativeBias` of the scores, or `None`."""
        return None

    # Building -------------------------------------------------------------------------------

    def build(self, query_shape, value_shape=None, key_shape=None):
        self._axes = self._checked_axes(query_shape, value_shape, key_shape)
        rank, features = len(query_shape), query_shape[-1]
        static_length = self._axes.length(query_shape)
        if self.max_sequence_length is None and self.lipschitz_bound is not None:
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
        self._features = features
        self._output_token = self._output_shape or (features,)
        self._add_kernels()
        self.output_bias = self._add_bias("output_bias", self._output_token)
        self._seed_generator = None
        if self.dropout > 0.0:
            self._seed_generator = keras.random.SeedGenerator(self.seed)
        self._add_running_state()

    def _checked_axes(self, query_shape, value_shape=None, key_shape=None):
        """`AttentionAxes` of a query, whose shape and those of value and key must be legal."""
        query_shape = tuple(query_shape)
        for name, shape in (("value", value_shape), ("key", key_shape)):
            if shape is not None and tuple(shape) != query_shape:
                raise ValueError(
                    f"{type(self).__name__} is self-attention: `{name}_shape` must be omitted or "
                    f"equal `query_shape`, since {self._not_cross}. Received: "
                    f"{name}_shape={tuple(shape)}, query_shape={query_shape}"
                )
        rank = len(query_shape)
        if rank < 3:
            raise ValueError(
                "`query` must have at least three axes, `(batch, tokens, features)`. "
                f"Received: query_shape={query_shape}"
            )
        features = query_shape[-1]
        if not features:
            raise ValueError(
                "The last axis of `query` must be static and not empty. "
                f"Received: query_shape={query_shape}"
            )
        if self.built and (rank, features) != (self.input_spec.ndim, self._features):
            raise ValueError(
                f"This layer was built for a `query` of {self.input_spec.ndim} axes whose last one "
                f"has {self._features} features. Received: query_shape={query_shape}"
            )
        return AttentionAxes(rank, self.attention_axes, query_shape)

    def _add_kernel(self, name, shape, input_axes):
        """A kernel whose first `input_axes` axes are the rows of the operator it stands for."""
        rows, cols = math.prod(shape[:input_axes]), math.prod(shape[input_axes:])
        initializer = self.kernel_initializer
        if isinstance(initializer, initializers.Initializer):
            # A copy draws other numbers, as long as no seed is given.
            initializer = initializer.__class__.from_config(initializer.get_config())
        return self.add_weight(
            name=name,
            shape=shape,
            # Fans are those of the matrix, not of a stack of small ones.
            initializer=lambda shape, dtype: ops.reshape(
                initializer((rows, cols), dtype=dtype), shape
            ),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    def _add_bias(self, name, shape):
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

    # Norms and bounds -------------------------------------------------------------------------

    def _capped_norms(self):
        names = list(self._projections) if self.spectral_norm is not None else []
        if self.lipschitz_bound is not None:
            names += self._bound_norms[self.lipschitz_norm]
        return names

    def _sum_slack(self, terms):
        """What covers a bound made of sums in the norm dtype, low by a roundoff for every term.

        Applied on the host too: both must come to the same factor.
        """
        # What Keras computes float64 in, on this backend.
        dtype = keras.backend.result_type(self._norm_dtype, self._norm_dtype)
        return 1.0 + 2.0 * terms * float(np.finfo(dtype).eps)

    def _as_operator(self, name, kernel, xp):
        return xp.reshape(kernel, self._norm_shapes()[name])

    def _asked(self, sequence_length, norm, mask):
        """Class of mask and number of tokens that `lipschitz` is asked about."""
        self._require_built("asking for its Lipschitz constant")
        require_norm("norm", norm)
        require_positive_integer("sequence_length", sequence_length, optional=True)
        visibility = classify(mask, sliding_window=self.sliding_window)
        sides = np.shape(mask)[-2:]
        # A class tells no length, nor does a mask that broadcasts along both axes.
        if isinstance(mask, str) or sides == (1, 1):
            return visibility, sequence_length or self._length
        return visibility, max(sequence_length or 1, *sides)

    # Calling ----------------------------------------------------------------------------------

    def __call__(
        self,
        query,
        value=None,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        **kwargs,
    ):
        # Here and not only in `call`: Keras converts every argument on its own, after which a
        # tensor passed twice may be two tensors. Then only the query goes on.
        self._require_self_attention(query, value, key)
        if isinstance(attention_mask, list | tuple):
            attention_mask = np.asarray(attention_mask)
        masks = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "attention_mask": attention_mask,
        }
        kwargs.update((name, mask) for name, mask in masks.items() if mask is not None)
        self._call_degrees.value = _constant_degrees(attention_mask)
        try:
            return super().__call__(query, **kwargs)
        finally:
            self._call_degrees.value = (None, None)

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
        )

    def _run(
        self,
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
        token_weights=None,
    ):
        """The body of `call`."""
        self._require_self_attention(query, value, key)
        training = bool(training)
        token_masks = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "mask of query": getattr(query, "_keras_mask", None),
            "token_weights": token_weights,
        }
        self._check_call(query, token_masks, attention_mask, self._axes)
        visibility = self._call_visibility(attention_mask, use_causal_mask)
        tokens = self._axes.flatten(query)
        if attention_mask is not None:
            attention_mask = self._axes.flatten_pairs(ops.cast(attention_mask, "bool"), query)
        valid = valid_tokens(
            [self._axes.flatten_mask(m) for m in token_masks.values() if m is not None]
        )
        if token_weights is not None:
            token_weights = log_weights(
                self._axes.flatten_mask(token_weights), valid, self._norm_dtype
            )
        mask = Mask(
            valid,
            attention_mask,
            use_causal_mask,
            self.sliding_window,
            token_weights,
            self._relative_biases(),
        )
        projections, c, bias = self._weights(visibility, training)
        heads, shift, scores = self._attend(
            tokens, projections, mask, training, return_attention_scores
        )
        if return_attention_scores:
            if mask.valid is not None:
                rows = mask.valid[:, None, :, None]
                scores = ops.where(rows, scores, ops.zeros_like(scores))
            scores = self._axes.restore_scores(scores, query)
        # What is the same for all tokens is one row an example: it passes through C before it is
        # added.
        if shift is not None:
            shift = ops.matmul(shift, c)
            bias = shift if bias is None else bias + shift
        output = ops.matmul(heads, c)
        if bias is not None:
            output = output + bias
        if self.lipschitz_bound is not None and tokens.shape[1] is None:
            too_long = ops.greater(ops.shape(tokens)[1], self.max_sequence_length)
            output = ops.where(too_long, ops.cast(np.nan, output.dtype), output)
        if mask.valid is not None:
            output = ops.where(ops.expand_dims(mask.valid, -1), output, ops.zeros_like(output))
        output = self._shape_token(self._axes.restore(output, query))
        return (output, scores) if return_attention_scores else output

    def _require_self_attention(self, query, value, key):
        for name, tensor in (("value", value), ("key", key)):
            if tensor is not None and tensor is not query:
                raise self._cross_attention(name, describe(tensor))

    def _cross_attention(self, name, got):
        return ValueError(
            f"{type(self).__name__} is self-attention: `{name}` must be omitted or be the very "
            f"object passed as `query`, since {self._not_cross}. Received: {name}={got}"
        )

    def _check_call(self, query, token_masks, attention_mask, axes):
        self._check_length(axes.length(query.shape))
        check_masks(query.shape, axes, self.num_heads, token_masks, attention_mask)
        if token_masks["token_weights"] is not None:
            check_token_weights(token_masks["token_weights"], self.lipschitz_bound)

    def _shape_token(self, output):
        if len(self._output_token) == 1:
            return output
        return ops.reshape(output, (*ops.shape(output)[:-1], *self._output_token))

    def _call_visibility(self, attention_mask, use_causal_mask):
        degrees = getattr(self._call_degrees, "value", (None, None))
        return self._visibility_under(attention_mask is not None, use_causal_mask, degrees)

    def _visibility_under(self, has_mask, use_causal_mask, degrees=(None, None)):
        if not has_mask:
            mask = "causal" if use_causal_mask else "full"
            return classify(mask, sliding_window=self.sliding_window)
        window = classify(
            "causal" if use_causal_mask else "any", sliding_window=self.sliding_window
        )
        return Visibility("any", *degrees).within(window)

    def capped_for(self, attention_mask, use_causal_mask):
        """The class of mask that the cap of a call with these arguments is for.

        Args:
            attention_mask: An array, `None`, or anything else for a mask that is not known.
            use_causal_mask: Whether later tokens are hidden.

        Returns:
            A `Visibility`: where the call may have known more or less of the mask, the one that
            scales down least.
        """
        degrees = _constant_degrees(attention_mask)
        return self._visibility_under(attention_mask is not None, use_causal_mask, degrees)

    def _tracked_length(self, visibility):
        """Number of tokens of the running bound."""
        tokens = self._tracking.sequence_length or self._length
        if tokens is None and visibility.n_queries is None:
            raise ValueError(
                f"The running bound of layer {self.path!r} needs a number of tokens: give the "
                "monitor a `sequence_length`, or the layer a `max_sequence_length`. Received: an "
                "input of unknown length"
            )
        return tokens

    # Keras ------------------------------------------------------------------------------------

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        self._checked_axes(query_shape, value_shape, key_shape)
        return (*query_shape[:-1], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(
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
        axes = self._checked_axes(query.shape)
        token_masks = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "token_weights": token_weights,
        }
        self._check_call(query, token_masks, attention_mask, axes)
        output = keras.KerasTensor(self.compute_output_shape(query.shape), self.compute_dtype)
        if not return_attention_scores:
            return output
        shape = axes.score_shape(query.shape, self.num_heads)
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


def _constant_degrees(attention_mask):
    """Degrees of one mask for all examples that is written down where the layer is called.

    They are unknown for any other mask. One per example is data: the mask of one example must not
    change the cap of another.
    """
    if not isinstance(attention_mask, np.ndarray) or attention_mask.ndim != 2:
        return None, None
    queries, keys = attention_mask.shape
    # Other shapes are refused in `call`.
    return degrees_of(attention_mask) if queries == keys or 1 in (queries, keys) else (None, None)
