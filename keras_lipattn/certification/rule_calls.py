"""Calls of rules: from a call of the trace to its map in a norm."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import KerasTensor

from keras_lipattn.certification.batch_axis import Layout
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.other_norms import OtherNorms
from keras_lipattn.certification.reasons import Cause
from keras_lipattn.certification.registry import find_rule
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.trace import TracedCall

_NOT_ASKED = unbounded("its rule is asked in the norm of the certificate only")


class RuleCalls:
    """Asks the rules about the calls of one propagation.

    Args:
        options: arguments of `certify`.
        norms: the states in other norms.
        state_of: a function that returns the state of a tensor of the trace.
        logit_call: index of the call whose activation is left out, or `None`.
    """

    def __init__(
        self,
        options: Options,
        norms: OtherNorms,
        state_of: Callable[[KerasTensor], TensorState],
        logit_call: int | None,
    ):
        self._options = options
        self._norms = norms
        self._state_of = state_of
        self._logit_call = logit_call

    def ask(
        self, index: int, call: TracedCall, arguments, layout: Layout, norm: str | None = None
    ) -> LipschitzMap:
        """The map of a call in a norm, by default that of the certificate."""
        rule, missing = find_rule(call.operation)
        if rule is None:
            return unbounded(missing, cause=Cause.NO_RULE)
        if not self._is_asked(rule, norm):
            return _NOT_ASKED
        if norm is not None:
            arguments = keras.tree.map_structure(
                lambda leaf: (
                    self._norms.view(leaf, norm) if isinstance(leaf, TensorState) else leaf
                ),
                arguments,
            )
        layer_call = self._layer_call(
            arguments,
            layout,
            norm or self._options.norm,
            compute_dtype=call.compute_dtype,
            drop_activation=index == self._logit_call,
            keras_masks=tuple(self._state_of(mask) for mask in call.keras_masks),
        )
        return _as_map(rule(call.operation, layer_call))

    def _layer_call(self, arguments, layout: Layout, norm: str, **fields) -> LayerCall:
        return LayerCall(
            norm=norm,
            arguments=arguments,
            shape=layout.shape,
            dynamic=layout.dynamic,
            fold=layout.fold,
            output_dtype=layout.dtype,
            mask=self._options.mask,
            assume_fixed_mask=self._options.assume_fixed_mask,
            ask=functools.partial(self._ask_layer, norm),
            **fields,
        )

    def _is_asked(self, rule: Callable, norm: str | None) -> bool:
        """Whether a rule is asked in a norm. Rules of users know the norm of the certificate."""
        own = getattr(rule, "__module__", "").startswith("keras_lipattn.")
        return own or norm in (None, self._options.norm)

    def _ask_layer(self, norm: str, layer: keras.layers.Layer, state: TensorState) -> LipschitzMap:
        """The map of an inner layer on one input, such as a layer used as an activation."""
        rule, missing = find_rule(layer)
        if rule is None:
            reason = f"{type(layer).__name__} {layer.name!r} inside it: {missing}"
            return unbounded(reason, cause=Cause.NO_RULE)
        if not self._is_asked(rule, norm):
            return _NOT_ASKED
        layout = Layout(state.shape, state.dynamic, state.fold, state.dtype)
        call = self._layer_call(
            {next(iter(layer._call_signature.parameters)): state},
            layout,
            norm,
            compute_dtype=layer.compute_dtype,
        )
        return _as_map(rule(layer, call))


def _as_map(answer: Any) -> LipschitzMap:
    if isinstance(answer, LipschitzMap):
        return answer
    value = float(answer)
    return LipschitzMap(
        constant=value,
        theorem="constant of its rule",
        reason="its rule returns no finite constant" if not math.isfinite(value) else "",
    )
