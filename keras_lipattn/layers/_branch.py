"""The branch of a residual or continuous layer: parts whose constants are known in a graph."""

import inspect
import math
from typing import Any

import keras
from keras import ops

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._activation import activation_constant
from keras_lipattn.layers._as_run import is_finite_as_run
from keras_lipattn.layers._composition import composed
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer
from keras_lipattn.layers.max_min import MaxMin
from keras_lipattn.layers.position_embedding import PositionEmbedding


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
        self._mask = "causal" if use_causal_mask else "full"
        self._parts: list[Any] = [_part(each) for each in layers]
        self._options = [
            {"use_causal_mask": use_causal_mask} if _attends(each) else {} for each in layers
        ]

    def hold(self):
        """The branch with the weights of now, evaluated once for any number of calls.

        Returns:
            Function of `x` `(B, ..., D)` and `valid` `(B, ...)` or `None`. It is zero where `valid`
            is false.
        """
        held = [
            part._hold(self._mask)
            if isinstance(part, LipschitzLayer) and part._condensed is None
            else None
            for part in self._parts
        ]

        def branch(x, valid):
            if valid is None:
                return self._run(x, held, {})
            rows = ops.expand_dims(valid, -1)
            # A padded entry may be anything; not even a NaN in it may reach a derivative.
            image = self._run(ops.where(rows, x, ops.zeros_like(x)), held, {"query_mask": valid})
            return ops.where(rows, image, ops.zeros_like(image))

        return branch

    def _run(self, x, held, masks):
        for part, weights, options in zip(self._parts, held, self._options, strict=True):
            if weights is not None:
                part._condensed = weights
            try:
                x = part(x, **options, **(masks if options else {}))
            finally:
                if weights is not None:
                    part._condensed = None
        return x

    def graph_bound(self, norm, tokens):
        """Upper bound of the constant for the weights as they run, a tensor or a float."""
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
        if not all(is_finite_as_run(w, self._layer.compute_dtype) for w in self._layer.weights):
            value, reason = math.inf, "the weights hold NaN or infinite entries"
        return LipschitzBound(
            value=value, norm=norm, kind="certified", theorem="largest slope", reason=reason
        )

    def _constant(self, norm):
        if isinstance(self._layer, keras.layers.Activation):
            return activation_constant(self._layer.activation, norm)
        return 1.0, ""


def _part(layer):
    if getattr(layer, "dropout", 0.0):
        raise ValueError(
            "A branch that drops entries at random is not one function. "
            f"Received: layer {layer.name!r} with dropout={layer.dropout}"
        )
    if isinstance(layer, keras.layers.Activation | MaxMin | PositionEmbedding):
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
