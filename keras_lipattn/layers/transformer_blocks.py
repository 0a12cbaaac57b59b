"""Transformer blocks that are made of layers with a proven Lipschitz constant."""

from typing import Any

import keras

from keras_lipattn._arguments import require_positive_integer
from keras_lipattn.layers.bounded_multi_head_attention import BoundedMultiHeadAttention
from keras_lipattn.layers.l2_multi_head_attention import L2MultiHeadAttention
from keras_lipattn.layers.max_min import MaxMin
from keras_lipattn.layers.orthogonal_dense import OrthogonalDense
from keras_lipattn.layers.residual import Residual
from keras_lipattn.layers.scaled_cosine_attention import ScaledCosineAttention

_KINDS = {
    "l2": L2MultiHeadAttention,
    "cosine": ScaledCosineAttention,
    "bounded": BoundedMultiHeadAttention,
}


class _TransformerBlock(keras.layers.Layer):
    """What the two blocks share: the arguments, attention layers and the perceptron."""

    def __init__(
        self,
        intermediate_dim,
        num_heads,
        dropout=0.0,
        attention="l2",
        lipschitz_bound: float | None = 1.0,
        lipschitz_norm="l2",
        max_sequence_length=None,
        token_radius=None,
        branch_weight=0.25,
        kernel_initializer="orthogonal",
        **kwargs,
    ):
        super().__init__(**kwargs)
        require_positive_integer("intermediate_dim", intermediate_dim, optional=False)
        require_positive_integer("num_heads", num_heads, optional=False)
        if intermediate_dim % 2:
            raise ValueError(
                "`intermediate_dim` must be even: `MaxMin` sorts its entries in pairs. "
                f"Received: intermediate_dim={intermediate_dim}"
            )
        if attention not in _KINDS:
            raise ValueError(
                f"`attention` must be one of {sorted(_KINDS)}. Received: attention={attention!r}"
            )
        if token_radius is not None and attention == "cosine":
            raise ValueError(
                "`token_radius` is for attention 'l2' and 'bounded'; cosines do not depend on the "
                f"length of tokens. Received: token_radius={token_radius}"
            )
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention = attention
        self.lipschitz_bound = lipschitz_bound
        self.lipschitz_norm = lipschitz_norm
        self.max_sequence_length = max_sequence_length
        self.token_radius = token_radius
        self.branch_weight = branch_weight
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def _make(self, layer_class, name, *args, **kwargs) -> Any:
        return layer_class(*args, dtype=self.dtype_policy, name=name, **kwargs)

    def _add_attention(self, name: str, features: int) -> None:
        """Set the attention layer and residual connection of one step."""
        if features % self.num_heads:
            raise ValueError(
                "The last axis must be a multiple of `num_heads`. "
                f"Received: features={features}, num_heads={self.num_heads}"
            )
        more = {} if self.token_radius is None else {"token_radius": self.token_radius}
        attention = self._make(
            _KINDS[self.attention],
            f"{name}_attention",
            self.num_heads,
            features // self.num_heads,
            dropout=self.dropout,
            lipschitz_bound=self.lipschitz_bound,
            lipschitz_norm=self.lipschitz_norm,
            max_sequence_length=self.max_sequence_length,
            kernel_initializer=_copy(self.kernel_initializer),
            **more,
        )
        setattr(self, f"_{name}_attention", attention)
        self._add_step(name)

    def _add_perceptron(self, features: int) -> None:
        self._expand = self._make(OrthogonalDense, "expand", self.intermediate_dim)
        self._sort = self._make(MaxMin, "sort")
        self._contract = self._make(OrthogonalDense, "contract", features)
        self._add_step("perceptron")

    def _add_step(self, name: str) -> None:
        add = self._make(Residual, f"{name}_add", self.branch_weight, trainable_alpha=True)
        drop = self._make(keras.layers.Dropout, f"{name}_dropout", self.dropout)
        setattr(self, f"_{name}_add", add)
        setattr(self, f"_{name}_dropout", drop)

    def _build_attention(self, name: str, shape, memory_shape=None) -> None:
        attention = getattr(self, f"_{name}_attention")
        if memory_shape is None:
            attention.build(shape)
        else:
            attention.build(shape, memory_shape)
        self._build_step(name, shape)

    def _build_perceptron(self, shape) -> None:
        wide = (*shape[:-1], self.intermediate_dim)
        self._expand.build(shape)
        self._sort.build(wide)
        self._contract.build(wide)
        self._build_step("perceptron", shape)

    def _build_step(self, name: str, shape) -> None:
        getattr(self, f"_{name}_dropout").build(shape)
        getattr(self, f"_{name}_add").build([shape, shape])

    def _attend(self, name: str, x, memory=None, training=None, **masks):
        others = () if memory is None else (memory,)
        branch = getattr(self, f"_{name}_attention")(x, *others, training=training, **masks)
        branch = getattr(self, f"_{name}_dropout")(branch, training=training)
        return getattr(self, f"_{name}_add")([x, branch])

    def _perceptron(self, x, training=None):
        branch = self._contract(self._sort(self._expand(x)))
        branch = self._perceptron_dropout(branch, training=training)
        return self._perceptron_add([x, branch])

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "attention": self.attention,
            "lipschitz_bound": self.lipschitz_bound,
            "lipschitz_norm": self.lipschitz_norm,
            "max_sequence_length": self.max_sequence_length,
            "token_radius": self.token_radius,
            "branch_weight": self.branch_weight,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_lipattn")
class TransformerEncoder(_TransformerBlock):
    """A block of a Transformer encoder with a Lipschitz constant of at most 1.

    ```
    x = (1 - a) * x + a * attention(x)
    x = (1 - b) * x + b * contract(sort(expand(x)))
    ```

    Attention has a cap, `expand` and `contract` are orthogonal, and `sort` is `MaxMin`. The weights
    `a` and `b` are learned. With `lipschitz_bound=1` no step has a constant above 1 in the norm of
    the cap (for `"l2"` and `"token"`), so the constant of a stack of blocks is at most 1 for any
    depth. There is no `LayerNormalization`, whose constant is some 30.

    Names and order of the arguments are those of `keras_hub.layers.TransformerEncoder` where both
    have them.

    Args:
        intermediate_dim: Size of the hidden layer, even.
        num_heads: Number of attention heads; divides the size of a token.
        dropout: Dropout of attention weights and branches.
        attention: `"l2"`, `"cosine"` or `"bounded"`: `L2MultiHeadAttention`,
            `ScaledCosineAttention` or `BoundedMultiHeadAttention`.
        lipschitz_bound: Cap of the constant of attention, or `None` for no cap.
        lipschitz_norm: Norm of the cap, `"l2"`, `"token"` or `"linf"`.
        max_sequence_length: Largest number of tokens. Needed for the cap where the length of the
            input is not static and the constant depends on it.
        token_radius: Radius of the ball that attention projects its tokens onto. For `"bounded"` 1
            by default, for `"l2"` none. Not for `"cosine"`.
        branch_weight: Initial weight of each branch, strictly between 0 and 1.
        kernel_initializer: Initializer of the kernels of attention.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tokens `(batch, tokens, features)`.
        padding_mask: `(batch, tokens)`, true for tokens and false for padding. A Keras mask of
            the inputs is used too.
        attention_mask: `(batch, tokens, tokens)`, true where a query sees a key. The certificate
            needs the diagonal to be visible, see the attention layer.
        training: Whether dropout applies.

    Output shape: That of the inputs.

    Raises:
        ValueError: If an argument is out of range, or the features are no multiple of `num_heads`.

    Example:

    >>> image = keras.Input((8, 8, 1))
    >>> x = keras_lipattn.SpaceToDepth(2)(image)
    >>> x = keras_lipattn.OrthogonalDense(32)(keras.layers.Reshape((16, 4))(x))
    >>> x = keras_lipattn.PositionEmbedding()(x)
    >>> for _ in range(4):
    ...     x = keras_lipattn.TransformerEncoder(64, num_heads=4)(x)
    >>> logits = keras_lipattn.OrthogonalDense(10)(keras.layers.Flatten()(x))
    >>> model = keras.Model(image, logits)
    >>> keras_lipattn.certify(model).total <= 1.0 + 1e-6
    True
    """

    def build(self, input_shape):
        self._add_attention("self", input_shape[-1])
        self._add_perceptron(input_shape[-1])
        self._build_attention("self", input_shape)
        self._build_perceptron(input_shape)

    def call(self, inputs, padding_mask=None, attention_mask=None, training=None):
        masks = {"query_mask": padding_mask, "attention_mask": attention_mask}
        x = self._attend("self", inputs, training=training, **masks)
        return self._perceptron(x, training)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)


@keras.saving.register_keras_serializable(package="keras_lipattn")
class TransformerDecoder(_TransformerBlock):
    """A block of a Transformer decoder with a Lipschitz constant, cross-attention included.

    As `TransformerEncoder`, with causal attention. With an `encoder_sequence` a step of
    cross-attention follows it:

    ```
    x = (1 - a) * x + a * causal_attention(x)
    x = (1 - c) * x + c * cross_attention(x, encoder_sequence)
    x = (1 - b) * x + b * contract(sort(expand(x)))
    ```

    Cross-attention has a constant only on bounded tokens: it needs `attention="bounded"`, or
    `attention="l2"` with a `token_radius`. Without an encoder the constant of the block is at most
    1 if the cap is 1. With one, `certify` gives the constant with respect to both sequences.

    Names and order of the arguments are those of `keras_hub.layers.TransformerDecoder` where both
    have them.

    Args:
        intermediate_dim: As for `TransformerEncoder`, as are all others.
        num_heads: Number of attention heads.
        dropout: Dropout of attention weights and branches.
        attention: `"l2"`, `"cosine"` or `"bounded"`.
        lipschitz_bound: Cap of the constant of attention, or `None`.
        lipschitz_norm: Norm of the cap.
        max_sequence_length: Largest number of tokens.
        token_radius: Radius of the ball that attention projects its tokens onto.
        branch_weight: Initial weight of each branch.
        kernel_initializer: Initializer of the kernels of attention.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        decoder_sequence: Tokens `(batch, tokens, features)`.
        encoder_sequence: Tokens `(batch, encoder_tokens, encoder_features)`, or `None`. For `"l2"`
            with as many features as the decoder sequence.
        decoder_padding_mask: `(batch, tokens)`, true for tokens and false for padding.
        decoder_attention_mask: `(batch, tokens, tokens)`; a query sees no later key in any case.
        encoder_padding_mask: `(batch, encoder_tokens)`.
        encoder_attention_mask: `(batch, tokens, encoder_tokens)`.
        training: Whether dropout applies.

    Output shape: That of the decoder sequence.

    Raises:
        ValueError: If an argument is out of range, or cross-attention has no constant.

    Example:

    >>> block = keras_lipattn.TransformerDecoder(64, num_heads=4, attention="bounded")
    >>> block(np.zeros((2, 5, 32)), np.zeros((2, 7, 16))).shape
    TensorShape([2, 5, 32])
    """

    def build(self, decoder_sequence_shape, encoder_sequence_shape=None):
        features = decoder_sequence_shape[-1]
        self._add_attention("self", features)
        self._has_memory = encoder_sequence_shape is not None
        if self._has_memory:
            if self.attention == "cosine" or (self.attention == "l2" and not self.token_radius):
                raise ValueError(
                    "Cross-attention has a constant only on bounded tokens: pass "
                    "attention='bounded', or attention='l2' with `token_radius`. Received: "
                    f"attention={self.attention!r}, token_radius={self.token_radius}"
                )
            self._add_attention("cross", features)
        self._add_perceptron(features)
        self._build_attention("self", decoder_sequence_shape)
        if self._has_memory:
            self._build_attention("cross", decoder_sequence_shape, encoder_sequence_shape)
        self._build_perceptron(decoder_sequence_shape)

    def call(
        self,
        decoder_sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        encoder_padding_mask=None,
        encoder_attention_mask=None,
        training=None,
    ):
        if (encoder_sequence is not None) != self._has_memory:
            raise ValueError(
                "A decoder is called with an encoder sequence always or never. Received: "
                f"{'one' if encoder_sequence is not None else 'none'}, after it was built "
                f"{'with' if self._has_memory else 'without'} one"
            )
        x = self._attend(
            "self",
            decoder_sequence,
            training=training,
            query_mask=decoder_padding_mask,
            attention_mask=decoder_attention_mask,
            use_causal_mask=True,
        )
        if encoder_sequence is not None:
            x = self._attend(
                "cross",
                x,
                encoder_sequence,
                training=training,
                query_mask=decoder_padding_mask,
                value_mask=encoder_padding_mask,
                attention_mask=encoder_attention_mask,
            )
        return self._perceptron(x, training)

    def compute_output_shape(self, decoder_sequence_shape, encoder_sequence_shape=None):
        return tuple(decoder_sequence_shape)


def _copy(initializer):
    """An equal initializer: one with a seed gives the same values at every call."""
    return (
        initializer.clone()
        if isinstance(initializer, keras.initializers.Initializer)
        else initializer
    )
