"""Calls of rules: from a call of the trace to its map in a norm."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import KerasTensor

from keras_lipattn.certification.batch_axis import Layout
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.other_norms import OtherNorms
from keras_lipattn.certification.reasons import Cause, Reason, inner_reason
from keras_lipattn.certification.registry import find_rule
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.trace import TracedCall
from keras_lipattn.certification.tracing import TRACE_ERRORS

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
        refusal = _refusal(call.operation, arguments, layout)
        if refusal:
            return unbounded(refusal)
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
        rule_map = _as_map(rule(call.operation, layer_call))
        return rule_map if len(call.outputs) == 1 else rule_map.of_several_outputs()

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
            return unbounded(inner_reason(layer, missing))
        if not self._is_asked(rule, norm):
            return _NOT_ASKED
        layout = Layout(state.shape, state.dynamic, state.fold, state.dtype)
        arguments = {next(iter(layer._call_signature.parameters)): state}
        refusal = _refusal(layer, arguments, layout)
        if not refusal and not _keeps_shape(layer, state):
            refusal = Reason(
                "it changes the shape of its input", remedy="use it as a layer after this one"
            )
        if refusal:
            return unbounded(inner_reason(layer, refusal))
        call = self._layer_call(
            arguments,
            layout,
            norm,
            compute_dtype=layer.compute_dtype,
        )
        return _as_map(rule(layer, call))


def _refusal(operation: Any, arguments: Mapping[str, Any], layout: Layout) -> Reason:
    """The reason why no rule applies to an operation or layer on these arguments, or none."""
    leaves = keras.tree.flatten(list(arguments.values()))
    states = [leaf for leaf in leaves if isinstance(leaf, TensorState)]
    is_layer = isinstance(operation, keras.layers.Layer)
    if any(map(_is_complex, [*leaves, layout, *(operation.weights if is_layer else ())])):
        return Reason("it computes with complex numbers", cause=Cause.NO_RULE)
    if is_layer and any(0 in state.shape for state in states):
        return Reason("its input has no entries", remedy="give every axis a size of at least 1")
    only_batch = any(state.fold and not state.shape for state in states)
    if only_batch and _acts_on_last_axis(operation):
        return Reason("it acts on the batch axis, the only one of its input", cause=Cause.BATCH)
    return Reason()


def _is_complex(leaf: Any) -> bool:
    return "complex" in str(getattr(leaf, "dtype", type(leaf)))


def _acts_on_last_axis(operation: Any) -> bool:
    """Whether an operation is a layer of this package, or of a subclass. All act on that axis."""
    ancestors = type(operation).__mro__
    return any(cls.__module__.startswith("keras_lipattn.layers.") for cls in ancestors)


def _keeps_shape(layer: keras.layers.Layer, state: TensorState) -> bool:
    """Whether the output of a layer has the shape of its input, for all sizes that vary."""
    varying = (
        None if varies else size for size, varies in zip(state.shape, state.dynamic, strict=True)
    )
    for sizes in (state.shape, tuple(varying)):
        try:
            output = layer.compute_output_spec(KerasTensor((None, *sizes), dtype=state.dtype))
        except TRACE_ERRORS:
            return False
        if not isinstance(output, KerasTensor) or tuple(output.shape[1:]) != tuple(sizes):
            return False
    return True


def _as_map(answer: Any) -> LipschitzMap:
    if isinstance(answer, LipschitzMap):
        return answer
    value = float(answer)
    return LipschitzMap(
        constant=value,
        theorem="constant of its rule",
        reason="its rule returns no finite constant" if not math.isfinite(value) else "",
    )
