"""Reasons why a call has no finite constant, and what to do about them."""

import dataclasses
import enum
from typing import Any

import keras

from keras_lipattn.layers._precision import is_finite


class Cause(enum.Enum):
    """Kinds of reasons whose remedy, or whose relation to other reasons, is known.

    Attributes:
        LAYER: the layer itself; the remedy depends on its class.
        BATCH: it mixes the examples of a batch, or depends on how many there are.
        CODE: its code cannot be run on symbolic tensors.
        MASK: it computes, or takes, a mask that changes with a certified input.
        NO_RULE: no rule is known for it.
        SIZE: the size of an axis is not known.
        UNBOUNDED: its inputs are not bounded.

    Example:

    >>> from keras_lipattn.certification import Cause, Reason
    >>> Reason("its number of tokens is not known", cause=Cause.SIZE).cause.name
    'SIZE'
    """

    LAYER = enum.auto()
    BATCH = enum.auto()
    CODE = enum.auto()
    MASK = enum.auto()
    NO_RULE = enum.auto()
    SIZE = enum.auto()
    UNBOUNDED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Reason:
    """The reason why a call has no finite constant, with a remedy.

    Args:
        text: why, as a clause about the call: `"it divides by a tensor that may come close to 0"`.
        remedy: what to do about it, as an imperative clause; empty where nothing helps. `None`
            leaves it to the kind of the reason and the class of the layer.
        replacement: what to use in place of the layer.
        cause: kind of the reason.

    Example:

    >>> from keras_lipattn.certification import Reason
    >>> str(Reason("it divides by its input", remedy="add 1 to it"))
    'it divides by its input; add 1 to it'
    """

    text: str = ""
    remedy: str | None = None
    replacement: str = ""
    cause: Cause = Cause.LAYER

    @classmethod
    def of(cls, reason: "Reason | str") -> "Reason":
        """A reason, where a rule may give its text alone."""
        return reason if isinstance(reason, Reason) else cls(reason)

    def __bool__(self) -> bool:
        return bool(self.text)

    def __str__(self) -> str:
        return "; ".join(part for part in (self.text, self.remedy) if part)

    def with_remedy(
        self, operation: Any, *, has_rule: bool, sequence_length: int | None = None
    ) -> "Reason":
        """The same reason with the remedy that fits this layer or operation.

        Args:
            operation: the layer or the node of `keras.ops`.
            has_rule: whether it has a rule.
            sequence_length: as passed to `certify`.
        """
        if self.remedy is not None:
            return self
        if self.replacement:
            return dataclasses.replace(self, remedy=f"use {self.replacement}")
        remedy = _remedy_of_cause(self.cause, operation, sequence_length)
        if remedy:
            return dataclasses.replace(self, remedy=remedy)
        cls = type(operation)
        is_layer = isinstance(operation, keras.layers.Layer)
        if is_layer and not all(
            is_finite(weight, operation.compute_dtype) for weight in operation.weights
        ):
            # Another layer would not help, nor would a rule.
            return dataclasses.replace(self, remedy="")
        if cls.__module__.startswith("keras.") and cls.__name__ in REPLACEMENTS:
            replacement = REPLACEMENTS[cls.__name__]
            return dataclasses.replace(self, remedy=f"use {replacement}", replacement=replacement)
        if not is_layer:
            remedy = "put it into a layer of its own with a rule, see `register_rule`"
        elif self.cause is Cause.CODE:
            remedy = (
                f"write it with `keras.ops`, or give it a rule with `register_rule({cls.__name__})`"
            )
        elif self.cause is Cause.NO_RULE or not has_rule:
            remedy = f"give it a rule with `register_rule({cls.__name__})`"
        return dataclasses.replace(self, remedy=remedy)


def _remedy_of_cause(cause: Cause, operation: Any, sequence_length: int | None) -> str:
    if cause is Cause.BATCH:
        return "keep the examples of a batch apart"
    if cause is Cause.SIZE:
        return FIXED_SIZES if sequence_length is not None else "pass `sequence_length`"
    if cause is Cause.UNBOUNDED:
        return "bound them by a saturating activation, a normalization or `input_radius`"
    if cause is Cause.MASK:
        fixed = (
            "make the mask a boolean input of the model, `keras.Input(shape, dtype='bool')`, or "
            "pass `assume_fixed_mask=True` to certify for a fixed mask"
        )
        is_layer = isinstance(operation, keras.layers.Layer)
        if is_layer and "use_causal_mask" in operation._call_signature.parameters:
            return f"pass `use_causal_mask=True` if it is the causal mask, else {fixed}"
        return fixed
    return ""


# What to use in place of a layer or operation, by the name of its class.
_ATTENTION = "L2MultiHeadAttention(lipschitz_bound=1)"
_NORMALIZATION = "CenterNormalization"
_DENSE = "SpectralDense(spectral_norm=1)"
_SPECTRAL = "SpectralDense(spectral_norm=1) on patches or channels"
_RECURRENT = f"{_ATTENTION} with `use_causal_mask=True`"
_ACTIVATION = "MaxMin, tanh or ReLU"
_AVERAGE = "GlobalAveragePooling1D"
REPLACEMENTS = {
    "AdditiveAttention": _ATTENTION,
    "Attention": _ATTENTION,
    "DotProductAttention": _ATTENTION,
    "GroupedQueryAttention": _ATTENTION,
    "L2MultiHeadAttention": _ATTENTION,
    "MultiHeadAttention": _ATTENTION,
    "ScaledCosineAttention": "ScaledCosineAttention(lipschitz_bound=1)",
    "BatchNormalization": _NORMALIZATION,
    "GroupNormalization": _NORMALIZATION,
    "LayerNorm": _NORMALIZATION,
    "LayerNormalization": _NORMALIZATION,
    "Normalize": _NORMALIZATION,
    "RMSNorm": _NORMALIZATION,
    "RMSNormalization": _NORMALIZATION,
    "UnitNormalization": _NORMALIZATION,
    "Dense": _DENSE,
    "Dot": _DENSE,
    "Einsum": _DENSE,
    "EinsumDense": _DENSE,
    "Matmul": _DENSE,
    "SpectralDense": _DENSE,
    **{f"{kind}{rank}D": _SPECTRAL for kind in ("Conv", "SeparableConv") for rank in (1, 2, 3)},
    "Conv": _SPECTRAL,
    "Conv1DTranspose": _SPECTRAL,
    "Conv2DTranspose": _SPECTRAL,
    "Conv3DTranspose": _SPECTRAL,
    "DepthwiseConv1D": _SPECTRAL,
    "DepthwiseConv2D": _SPECTRAL,
    "Add": "Residual",
    "Subtract": "Residual",
    "Flatten": _AVERAGE,
    "GlobalMaxPooling1D": _AVERAGE,
    "Sum": "the mean, or GlobalAveragePooling1D",
    "ConvLSTM1D": _SPECTRAL,
    "ConvLSTM2D": _SPECTRAL,
    "ConvLSTM3D": _SPECTRAL,
    "Bidirectional": _ATTENTION,
    "GRU": _RECURRENT,
    "LSTM": _RECURRENT,
    "RNN": _RECURRENT,
    "SimpleRNN": _RECURRENT,
    "Activation": _ACTIVATION,
    "CELU": _ACTIVATION,
    "Celu": _ACTIVATION,
    "ELU": _ACTIVATION,
    "Exp": _ACTIVATION,
    "Gelu": _ACTIVATION,
    "ReLU": _ACTIVATION,
    "Sparsemax": _ACTIVATION,
    "Threshold": _ACTIVATION,
}

# Remedies and reasons of several rules ------------------------------------------------------------

FIXED_SIZES = "build the model with fixed sizes"
NO_TRAINING = "call it without `training=True`"
JOIN_TOKENS = "attend to all of them joined along the tokens"
NOT_QUANTIZED = "certify the model before it is quantized"

DEPENDS_ON_BATCH = Reason(
    "its result depends on the number of examples in the batch", cause=Cause.BATCH
)
MOVES_BATCH = Reason("it mixes the examples of a batch, or moves the batch axis", cause=Cause.BATCH)
REPEATS = Reason(
    "it repeats an input along an axis of unknown size, or along the batch axis", cause=Cause.BATCH
)
COMPUTES_MASK = Reason(
    "it computes a mask from its input, and the mask jumps when the input changes",
    cause=Cause.MASK,
)
COMPUTES_INTEGERS = Reason(
    "it computes integers or a mask from a certified input, and they jump when the input changes",
    cause=Cause.MASK,
)
TAKES_MASK = Reason(
    "its mask is computed from a certified input and jumps when the input changes", cause=Cause.MASK
)
CONDITION_JUMPS = Reason("its condition changes with the input, and the output jumps with it")
NOT_FINITE = Reason("its weights contain NaN or infinite values", remedy="")
BIAS_ELSEWHERE = Reason(
    "Keras on TensorFlow adds a bias of shape `(size, 1)` along the tokens when there are as many",
    remedy="use sizes above 1, such as `key_dim=2`, or `use_bias=False`",
)
RETURNS_SCORES = Reason(
    "it also returns its attention scores, for which no bound is known",
    remedy="leave out `return_attention_scores=True`",
)
UNBOUNDED_TOKENS = Reason(
    "dot-product attention is not Lipschitz where its tokens are unbounded",
    remedy=f"use {_ATTENTION}, or bound its tokens by a normalization before it or by "
    "`input_radius`",
    replacement=_ATTENTION,
)
UNKNOWN_ACTIVATION = Reason("the constant of its activation is not known", replacement=_ACTIVATION)
UNKNOWN_TOKENS = Reason("its number of tokens is not known", cause=Cause.SIZE)
SIZE_VARIES = Reason("the size of one of its axes varies, or is not known", remedy=FIXED_SIZES)


def inner_reason(layer: keras.layers.Layer, reason: Reason | str) -> Reason:
    """The reason why a layer has no constant, from that of a layer inside it."""
    reason = Reason.of(reason)
    text = f"{type(layer).__name__} {layer.name!r} inside it: {reason.text}"
    return dataclasses.replace(reason, text=text, cause=Cause.NO_RULE)


def in_training(what: str = "") -> Reason:
    """The reason for a layer that runs as in training, and what it does then."""
    text = "the model calls it with `training=True`, also at inference"
    return Reason(f"{text}: {what}" if what else text, remedy=NO_TRAINING)
