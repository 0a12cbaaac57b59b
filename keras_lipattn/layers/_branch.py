"""The branch of a residual or continuous layer: parts whose constants are known in a graph."""

import inspect
import math
from typing import Any

import keras
from keras import ops

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._dense import activation_constant
from keras_lipattn.layers._masks import mask_class
from keras_lipattn.layers._precision import is_finite
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer
from keras_lipattn.layers.max_min import MaxMin
from keras_lipattn.layers.position_embedding import PositionEmbedding
from keras_lipattn.layers.self_attention import SelfAttention


class Branch:
    """A layer, or a `keras.Sequential` of layers, run at inference one after the other.

    Args:
        layer: A layer with the methods `graph_bound` and `lipschitz`, a `keras.layers.Activation`,
            `MaxMin`, `PositionEmbedding`, or a `keras.Sequential` of such layers.
        use_causal_mask: Whether attention in it is causal.
        dtype: Dtype in which every part must compute.

    Raises:
        ValueError: If a part has no constant that is known in a graph, drops entries at random, or
            computes in another dtype.
    """

    def __init__(self, layer, use_causal_mask, dtype):
        layers = layer.layers if isinstance(layer, keras.Sequential) else [layer]
        for each in layers:
            if each.compute_dtype != dtype:
                raise ValueError(
                    f"Every layer of `branch` must compute in {dtype}. "
                    f"Received: layer {each.name!r} with compute dtype {each.compute_dtype!r}"
                )
        self.layers = layers
        self._mask = "causal" if use_causal_mask else "full"
        self._parts: list[Any] = [_part(each) for each in layers]
        self._options = [
            {"use_causal_mask": use_causal_mask} if _attends(each) else {} for each in layers
        ]

    def freeze(self):
        """The branch with its current weights, evaluated once for any number of calls.

        Returns:
            Function of `x` `(B, ..., D)` and `valid` `(B, ...)` or `None`. It is zero where `valid`
            is false.
        """
        known = [
            mask_class(self._mask, sliding_window=part.sliding_window)
            if isinstance(part, SelfAttention)
            else None
            for part in self._parts
        ]
        weights = [
            part.effective_weights(mask) if isinstance(part, LipschitzLayer) else None
            for part, mask in zip(self._parts, known, strict=True)
        ]

        def branch(x, valid):
            if valid is None:
                return self._run(x, weights, None)
            rows = ops.expand_dims(valid, -1)
            # A padded entry may be anything; not even a NaN in it may reach a derivative.
            image = self._run(ops.where(rows, x, ops.zeros_like(x)), weights, valid)
            return ops.where(rows, image, ops.zeros_like(image))

        return branch

    def _run(self, x, weights, valid):
        for part, own, options in zip(self._parts, weights, self._options, strict=True):
            if isinstance(part, SelfAttention):
                mask = part.mask_of_call(x, {"query_mask": valid}, **options)
                x = part.call_with_weights(own, x, mask)
            elif isinstance(part, LipschitzLayer):
                x = part.call_with_weights(own, x)
            else:
                x = part(x, **options, **({"query_mask": valid} if options else {}))
        return x

    def graph_bound(self, norm, tokens):
        """Upper bound of the constant for the weights of inference, a tensor or a float."""
        return math.prod(
            part.graph_bound(norm=norm, sequence_length=tokens, mask=self._mask)
            for part in self._parts
        )

    def lipschitz(self, norm, tokens):
        """The certified constant, on the host: a `LipschitzBound`."""
        return composed(
            [
                part.lipschitz(sequence_length=tokens, norm=norm, mask=self._mask)
                for part in self._parts
            ]
        )


class _FixedConstant:
    """A layer whose constant is the same for all weights, with the methods the others have."""

    def __init__(self, layer):
        self._layer = layer

    def __call__(self, x):
        return self._layer(x)

    def graph_bound(self, *, norm, sequence_length, mask):
        return self._constant(norm)[0]

    def lipschitz(self, sequence_length=None, norm="l2", mask="full"):
        value, reason = self._constant(norm)
        if not all(is_finite(w, self._layer.compute_dtype) for w in self._layer.weights):
            value, reason = math.inf, "the weights hold NaN or infinite entries"
        return LipschitzBound(
            value=value, norm=norm, kind="certified", theorem="largest slope", reason=reason
        )

    def _constant(self, norm):
        if type(self._layer) is keras.layers.Activation:
            return activation_constant(self._layer.activation, norm)
        return 1.0, ""


def _part(layer):
    if getattr(layer, "dropout", 0.0):
        raise ValueError(
            "A branch that drops entries at random is not one function. "
            f"Received: layer {layer.name!r} with dropout={layer.dropout}"
        )
    # A subclass may compute something else.
    if type(layer) in (keras.layers.Activation, MaxMin, PositionEmbedding):
        part = _FixedConstant(layer)
        bound = part.lipschitz()
        if bound.is_finite:
            return part
        raise ValueError(f"A branch needs a Lipschitz constant. Received: {bound.reason}")
    if not hasattr(layer, "graph_bound"):
        raise ValueError(
            "Every layer of `branch` needs a Lipschitz constant that can be evaluated in a graph: "
            "`L2MultiHeadAttention`, `SpectralDense`, `CenterNormalization`, `MaxMin`, "
            "`PositionEmbedding`, `keras.layers.Activation`, or a layer with the methods "
            "`graph_bound` and `lipschitz`. "
            f"Received: layer {layer.name!r} of class {type(layer).__name__}"
        )
    return layer


def _attends(layer):
    return "use_causal_mask" in inspect.signature(layer.call).parameters


def composed(bounds):
    """Certified constant of maps in a row, from theirs: a `LipschitzBound` in the same norm."""
    reason = "; ".join(dict.fromkeys(bound.reason for bound in bounds if not bound.is_finite))
    value = math.inf if reason else math.prod(bound.value for bound in bounds)
    if not reason and math.isinf(value):
        reason = "the bound is larger than the largest float64"
    return LipschitzBound(
        value=value,
        norm=bounds[0].norm,
        kind="certified",
        theorem=", then ".join(dict.fromkeys(bound.theorem for bound in bounds)),
        reason=reason,
    )
