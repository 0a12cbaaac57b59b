"""Lipschitz layers in place of the layers of Keras, one by one."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.rules.activations import name_of
from keras_lipattn.conversion.calls import Calls
from keras_lipattn.layers import (
    BoundedMultiHeadAttention,
    L2MultiHeadAttention,
    MaxMin,
    NormalizedDense,
    OrthogonalDense,
    Residual,
    ScaledCosineAttention,
    SpaceToDepth,
    SpectralConv2D,
    SpectralDense,
)

DENSE: dict[str, Any] = {"orthogonal": OrthogonalDense, "spectral": SpectralDense}
ATTENTION: dict[str, Any] = {
    "l2": L2MultiHeadAttention,
    "cosine": ScaledCosineAttention,
    "bounded": BoundedMultiHeadAttention,
}
# Activations that halve the gradient of half of their inputs or more. The others stay.
RECTIFIERS = frozenset(
    "celu elu gelu gelu_tanh hard_silu leaky_relu mish relu relu6 selu silu softplus".split()
)
_RECTIFIER_LAYERS = (
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ReLU,
)
_NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)
_MAX_POOLING = (
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
)
# Layers that have a replacement in some cases, and reasons why they have none in the others.
_NO_REPLACEMENT = "{} has no Lipschitz replacement: its kernel can grow in training"
_UNREPLACED = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.EinsumDense,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_OWN_DENSE = (NormalizedDense, OrthogonalDense, SpectralDense)
_WITH_ACTIVATION = (
    keras.layers.Activation,
    keras.layers.Dense,
    *_UNREPLACED,
    *_OWN_DENSE,
)
_ATTENTION_OF_KERAS = (
    keras.layers.AdditiveAttention,
    keras.layers.Attention,
    keras.layers.GroupQueryAttention,
)
# Names of activations that return probabilities, by the class of their layer or operation.
_PROBABILITIES = {"LogSoftmax": "log_softmax", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_SHARED = (
    "activation use_bias bias_initializer kernel_regularizer bias_regularizer activity_regularizer "
    "kernel_constraint bias_constraint name trainable dtype"
).split()


class Kept(Exception):
    """A layer that stays, with the reason."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """Arguments of `make_lipschitz` that say what layers are replaced by."""

    dense: str
    attention: str
    lipschitz_bound: float | None
    norm: str
    branch_weight: float
    token_radius: float
    sequence_length: int | None


def replacement(old: Any, calls: Calls, choices: Choices) -> keras.layers.Layer | None:
    """The layer that replaces a layer, `None` where nothing needs to be replaced.

    Args:
        old: A built layer. Its weights are the first weights of the new layer, except for
            attention.
        calls: The calls of the layers of the model.
        choices: What to replace by what.

    Raises:
        Kept: If the layer stays although a Lipschitz layer would be better, with the reason.
    """
    kind = type(old)
    if kind is keras.layers.MultiHeadAttention:
        return _attention(old, calls, choices)
    if kind in (keras.layers.Dense, keras.layers.EinsumDense):
        return _dense(old, old, calls, choices)
    if kind is keras.layers.TimeDistributed and type(old.layer) is keras.layers.Dense:
        # It is applied to every token anyway.
        return _dense(old.layer, old, calls, choices)
    if kind in (keras.layers.Conv1D, keras.layers.Conv2D):
        return _convolution(old, calls, choices)
    if kind in _NORMALIZATIONS:
        return _normalization(old, calls)
    if kind is keras.layers.Add:
        return merged(old, calls, choices)
    if kind in _OWN_DENSE:
        return _without_activation(old) if id(old) in calls.without_activation else None
    if kind is keras.layers.Softmax:
        return identity(old, calls) if id(old) in calls.without_activation else None
    if kind is keras.layers.Activation or kind in _RECTIFIER_LAYERS:
        return _activation(old, calls)
    if kind in _MAX_POOLING:
        return _max_pooling(old)
    for parent in (keras.layers.MultiHeadAttention, keras.layers.Dense, *_UNREPLACED):
        if isinstance(old, parent) and kind is not parent and not _is_of_keras(kind):
            raise Kept(f"it is an instance of the subclass {kind.__name__}, whose code is unknown")
    if kind in _UNREPLACED:
        raise Kept(_NO_REPLACEMENT.format(kind.__name__))
    if kind in _ATTENTION_OF_KERAS:
        raise Kept(f"{kind.__name__} has no Lipschitz replacement: use `MultiHeadAttention`")
    return None


def probabilities(call: Any) -> str:
    """Name of the softmax or sigmoid that a call ends in, over its last axis; else empty."""
    operation = call.operation
    kind = type(operation)
    if kind in _WITH_ACTIVATION:
        name = name_of(operation.activation)
        return name if name in _PROBABILITIES.values() else ""
    if not _is_of_keras(kind) or call.arguments.get("mask") is not None:
        return ""
    over_classes = getattr(operation, "axis", -1) in (-1, len(call.outputs[0].shape) - 1)
    return _PROBABILITIES.get(kind.__name__, "") if over_classes else ""


def identity(old: Any, calls: Calls) -> keras.layers.Layer:
    """A layer of the same name that returns its input, in place of a layer or operation."""
    if isinstance(old, keras.layers.Layer):
        dtype = old.dtype_policy.name
    else:
        dtype = calls.of(old)[0].outputs[0].dtype
    return keras.layers.Identity(name=old.name, dtype=dtype)


def _is_of_keras(kind: type) -> bool:
    return kind.__module__.startswith("keras.")


# Attention ----------------------------------------------------------------------------------------


def _attention(old: Any, calls: Calls, choices: Choices) -> keras.layers.Layer:
    config = old.get_config()
    if config.pop("use_gate"):
        raise Kept("it has a gate, and a product with a gate has no Lipschitz bound")
    if not calls.of(old):
        raise Kept(
            "no call of it at inference was seen, so it is not known whether it attends to other "
            "tokens than its own"
        )
    is_cross = any(calls.is_cross_attention(call) for call in calls.of(old))
    kind = ATTENTION["bounded" if is_cross else choices.attention]
    if config["kernel_initializer"]["class_name"] == "GlorotUniform":
        config["kernel_initializer"] = "orthogonal"
    if kind is BoundedMultiHeadAttention:
        config["token_radius"] = choices.token_radius
        # Keras leaves it out of the configuration.
        config["flash_attention"] = old._flash_attention
    new = kind.from_config(
        {
            **config,
            # Its weights are new, so they must be trained.
            "trainable": True,
            "lipschitz_bound": choices.lipschitz_bound,
            "lipschitz_norm": choices.norm,
            "max_sequence_length": choices.sequence_length,
        }
    )
    shapes = old.get_build_config()["shapes_dict"]
    if kind is BoundedMultiHeadAttention:
        new.build(**shapes)
    else:
        new.build(shapes["query_shape"])
    return new


# Layers with a kernel -----------------------------------------------------------------------------


def _dense(old: Any, place: Any, calls: Calls, choices: Choices) -> keras.layers.Layer:
    if isinstance(old, keras.layers.EinsumDense) and not _is_dense(old):
        raise Kept(
            f"its equation {old.equation!r} is not that of a dense layer on the last axis, so it "
            "has no Lipschitz replacement"
        )
    _require_plain(old)
    kernel = keras.ops.convert_to_numpy(old.kernel)
    return _with_kernel(
        old, DENSE[choices.dense], {"units": kernel.shape[1]}, kernel, calls, place=place
    )


def _is_dense(old: keras.layers.EinsumDense) -> bool:
    """Whether the equation is `...x,xy->...y`, with letters or dots for the axes in front."""
    equation = old.equation.replace(" ", "").replace("...", "")
    inputs, _, rest = equation.partition(",")
    kernel, _, outputs = rest.partition("->")
    return (
        len(kernel) == 2
        and inputs.endswith(kernel[0])
        and kernel[1] not in inputs
        and outputs == inputs[:-1] + kernel[1]
        and old.bias_axes in (None, "", kernel[1])
    )


def _require_plain(old: Any) -> None:
    if getattr(old, "quantization_mode", None) is not None:
        raise Kept(f"it is quantized: its dtype is {old.dtype_policy.name!r}")


def _convolution(old: Any, calls: Calls, choices: Choices) -> keras.layers.Layer:
    _require_plain(old)
    plain = (
        old.groups == 1
        and old.data_format == "channels_last"
        and set(old.dilation_rate) == {1}
        and old.padding in ("valid", "same")
    )
    kernel = keras.ops.convert_to_numpy(old.kernel)
    *sides, features, filters = kernel.shape
    dense = DENSE[choices.dense]
    if plain and set(sides) == set(old.strides) == {1}:
        # A dense layer of every position.
        kernel = kernel.reshape(features, filters)
        return _with_kernel(old, dense, {"units": filters}, kernel, calls)
    if plain and len(set(sides)) == 1 and tuple(sides) == tuple(old.strides):
        shape = (old.get_build_config() or {}).get("input_shape", (None,))
        if None not in shape[1:] and not any(side % sides[0] for side in shape[1:-1]):
            # Patches: an isometry, and a dense layer of every patch.
            blocks = SpaceToDepth(sides[0], name="patches", dtype=old.dtype_policy.name)
            kernel = kernel.reshape(-1, filters)
            return _with_kernel(old, dense, {"units": filters}, kernel, calls, shape, blocks)
    if not plain or len(sides) != 2:
        raise Kept(
            f"{type(old).__name__} has no Lipschitz replacement with these arguments: its kernel "
            "can grow in training. `SpectralConv2D` has two axes, no groups and no dilation"
        )
    sizes = {
        "filters": filters,
        "kernel_size": old.kernel_size,
        "strides": old.strides,
        "padding": old.padding,
    }
    return _with_kernel(old, SpectralConv2D, sizes, kernel, calls)


def _with_kernel(
    old: Any,
    kind: Any,
    sizes: dict[str, Any],
    kernel: np.ndarray,
    calls: Calls,
    shape: tuple | None = None,
    *before: Any,
    place: Any = None,
) -> keras.layers.Layer:
    """The new layer with the weights and activation of `old`.

    Args:
        old: The layer to replace.
        kind: Class of the new layer.
        sizes: Arguments of the new layer, other than those that both have.
        kernel: The first kernel of the new layer.
        calls: The calls of the layers of the model.
        shape: Shape of the input, where layers in front need it.
        *before: Layers in front of the new one.
        place: The layer whose place the new one takes, by default `old`.
    """
    place = place or old
    config = old.get_config()
    config.setdefault("use_bias", old.bias is not None)
    shared = {name: config[name] for name in _SHARED if name in config}
    activation, after = old.activation, []
    if id(old) in calls.without_activation:
        activation = None
    shared["name"] = place.name
    if name_of(activation) in RECTIFIERS and id(old) not in calls.last:
        shape = shape or calls.input_shape(place)
        if kernel.shape[-1] % 2 or shape is None:
            activation = keras.activations.relu
        else:
            activation = None
            after = [MaxMin(name="max_min", dtype=old.dtype_policy.name)]
    shared["activation"] = activation
    if before or after:
        shared["name"] = "linear"
    new = kind(**sizes, **shared)
    new.build((None, *(1,) * (kernel.ndim - 2), kernel.shape[-2]))
    new.kernel.assign(kernel)
    if new.bias is not None:
        new.bias.assign(old.bias)
    return _in_a_row([*before, new, *after], place, shape)


def _in_a_row(layers: list[Any], old: Any, shape: tuple | None) -> keras.layers.Layer:
    if len(layers) == 1:
        return layers[0]
    inputs = keras.Input(shape[1:], dtype=old.input_dtype) if shape else None
    row = keras.Sequential([inputs, *layers] if shape else layers, name=old.name)
    row.trainable = old.trainable
    # Keras warns that it loses the mask, unless told: its layers pass the mask on.
    row.supports_masking = all(layer.supports_masking for layer in layers)
    return row


# Layers without a kernel --------------------------------------------------------------------------


def _normalization(old: Any, calls: Calls) -> keras.layers.Layer:
    """The identity; after a sum of `n` tensors in the code of a layer, their mean."""
    terms = calls.terms_before(old)
    if terms > 1:
        return keras.layers.Rescaling(1.0 / terms, name=old.name, dtype=old.dtype_policy.name)
    return identity(old, calls)


def merged(old: Any, calls: Calls, choices: Choices) -> keras.layers.Layer | None:
    """The convex combination in place of a sum, an `Add` layer or operation; `None` for none."""
    called = calls.of(old)
    if not called:
        # An `Add` layer that the model does not call at inference costs nothing.
        return None
    terms = [each for call in called if (each := calls.terms(call)) is not None]
    if len(terms) < len(called):
        # A constant, or a tensor that does not change, is a translation.
        return None
    name = {"name": old.name}
    if isinstance(old, keras.layers.Layer):
        name["dtype"] = old.dtype_policy.name
    if max(map(len, terms)) > 2:
        return keras.layers.Average(**name)
    skips = {calls.skip(one, other) for one, other in terms}
    weights: dict[tuple, float] = {(0,): choices.branch_weight, (1,): 1.0 - choices.branch_weight}
    return Residual(weights.get(tuple(skips), 0.5), trainable_alpha=True, **name)


def _without_activation(old: Any) -> keras.layers.Layer:
    """A dense layer of this package with the same weights and no activation."""
    new = type(old).from_config({**old.get_config(), "activation": None})
    new.build_from_config(old.get_build_config())
    new.set_weights(old.get_weights())
    return new


def _activation(old: Any, calls: Calls) -> keras.layers.Layer | None:
    if id(old) in calls.without_activation:
        return identity(old, calls)
    name = "relu"
    if type(old) is keras.layers.Activation:
        name = name_of(old.activation)
        if not name:
            raise Kept("it is not an activation of Keras: its constant is unknown")
    if name not in RECTIFIERS or id(old) in calls.last:
        return None
    options = {"name": old.name, "dtype": old.dtype_policy.name}
    shape = calls.input_shape(old)
    if shape is None or shape[-1] is None or shape[-1] % 2:
        return keras.layers.Activation("relu", **options)
    return MaxMin(**options)


def _max_pooling(old: Any) -> keras.layers.Layer | None:
    """The same with windows that do not overlap, whose constant is 1."""
    if all(size <= stride for size, stride in zip(old.pool_size, old.strides, strict=True)):
        return None
    if old.padding != "same":
        raise Kept(
            "its windows overlap, so its constant is above 1: pass `strides` as large as "
            "`pool_size`, or `padding='same'`"
        )
    sizes = tuple(min(pair) for pair in zip(old.pool_size, old.strides, strict=True))
    return type(old).from_config({**old.get_config(), "pool_size": sizes})
