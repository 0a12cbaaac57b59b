"""Propagation of Lipschitz constants through a trace, from the inputs to the outputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import KerasTensor

from keras_lipattn.certification.batch_axis import BatchComparison, Layout
from keras_lipattn.certification.class_code import operation_name, reads_arguments_alone
from keras_lipattn.certification.fixed_entries import interval_after
from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.layer_call import is_mask
from keras_lipattn.certification.local_pass import LocalPass
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.other_norms import OtherNorms
from keras_lipattn.certification.reasons import (
    COMPUTES_INTEGERS,
    MOVES_BATCH,
    TAKES_MASK,
    Cause,
    Reason,
)
from keras_lipattn.certification.rows import Rows
from keras_lipattn.certification.rule_calls import RuleCalls
from keras_lipattn.certification.tensor_state import Interval, Kind, TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.trace import Trace, TracedCall

# Operations that move integers without computing with their values.
_MOVES = frozenset(
    (
        "BroadcastTo Cast Concatenate ConvertToTensor ExpandDims Flatten GetItem Identity Permute "
        "Reshape Slice Split Squeeze StopGradient Swapaxes Transpose"
    ).split()
)
_READS_MORE = Reason(
    "it runs code that may read other tensors than its arguments",
    remedy="write it with layers and operations of Keras",
)
_COMPARISONS = frozenset({"Greater", "GreaterEqual", "Less", "LessEqual"})
# Operations whose output depends only on the shape of the input.
_FILLED = {
    "EmptyLike": (-math.inf, math.inf),
    "FullLike": (-math.inf, math.inf),
    "OnesLike": (1.0, 1.0),
    "ZerosLike": (0.0, 0.0),
}


# An output of which nothing is known.
_NUMBER = Layout((), (), 1, "float32")


class Propagation:
    """One propagation of constants through a trace.

    Args:
        trace: the trace of the model.
        comparison: comparison of this trace with one on another number of examples.
        options: arguments of `certify`.
        local: for a local certificate, its ball.
        logit_call: index of the call whose activation is left out, or `None`.
    """

    def __init__(
        self,
        trace: Trace,
        comparison: BatchComparison,
        options: Options,
        local: LocalPass | None = None,
        logit_call: int | None = None,
    ):
        self.trace = trace
        self.options = options
        self.local = local
        self.rows = Rows(trace, comparison.refusals, options.sequence_length)
        self.inputs: list[str] = []
        self.looked_up_inputs: dict[int, str] = {}
        self.computed_inputs: set[int] = set()
        self.assumed_masks: list[str] = []
        self.max_tokens: list[int] = []
        self.fixed_inputs: list[str] = []
        self.states: dict[int, TensorState] = {}
        # Indices of the calls that the outputs depend on, and of those whose output takes the place
        # of the certified input.
        self.needed: set[int] = set()
        self.resets: set[int] = set()
        self._comparison = comparison
        self._norms = OtherNorms(options.norm)
        self._rules = RuleCalls(options, self._norms, self.state_of, logit_call)

    def run(self, names: Sequence[str]) -> list[TensorState]:
        """Propagates constants and returns the states of the outputs.

        Args:
            names: names of the inputs, in order.
        """
        states = [
            self._input_state(name, self._layout(tensor))
            for name, tensor in zip(names, self.trace.inputs, strict=True)
        ]
        if self.local is not None:
            states = self.local.begin(states)
        for tensor, state in zip(self.trace.inputs, states, strict=True):
            self.states[id(tensor)] = self._norms.complete(state)
        self.needed = self.trace.needed_calls()
        last_uses = self.trace.last_uses()
        for index, call in enumerate(self.trace.calls):
            if index in self.needed:
                outputs = self._apply(index, call)
                for tensor, state in zip(call.outputs, outputs, strict=True):
                    self.states[id(tensor)] = self._norms.complete(state)
            for tensor in last_uses.get(index, ()):
                # Matrices of a deep model need as much memory as its weights.
                if id(tensor) in self.states:
                    self.states[id(tensor)] = self.states[id(tensor)].without_maps()
        if self.local is not None:
            self.local.is_complete = True
        return [self._of_one_example(self.state_of(tensor)) for tensor in self.trace.outputs]

    def state_of(self, tensor: KerasTensor) -> TensorState:
        """The state of a tensor of the trace."""
        tensor = self.trace.resolve(tensor)
        if id(tensor) not in self.states:
            # A layer returned a constant.
            values = keras.ops.convert_to_numpy(self.trace.constants[id(tensor)])
            layout = self._layout(tensor)
            numbers = values.dtype.kind in "fiub"
            self.states[id(tensor)] = self._fixed(
                layout,
                values=values.astype("float64") if numbers else None,
                range=TokenRange.of_values(values) if numbers else TokenRange(),
            )
        return self.states[id(tensor)]

    def _layout(self, tensor: KerasTensor) -> Layout:
        known = self._comparison.layouts.get(id(tensor))
        if known is not None:
            return known
        shape = tuple(tensor.shape[1:])
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        return Layout(shape, (False,) * len(shape), 1, dtype)

    # Inputs -----------------------------------------------------------------------------------

    def _source(self, name: str) -> Gain:
        """Adds a certified input and returns its gain."""
        self.inputs.append(name)
        return Gain.of_source(self.options.norm, len(self.inputs) - 1)

    def _input_state(self, name: str, layout: Layout) -> TensorState:
        if layout.dtype in ("bool", "string"):
            self.fixed_inputs.append(name)
            kind = Kind.FIXED if layout.dtype == "bool" else Kind.FROM_INTEGERS
            return self._fixed(layout, kind=kind)
        gain = self._source(name)
        integer = _is_integer(layout.dtype)
        return TensorState(
            gain=gain,
            published=gain,
            kind=Kind.INTEGER if integer else Kind.PERTURBED,
            integer_input=len(self.inputs) - 1 if integer else None,
            range=self._input_range(),
            **layout.fields(),
        )

    def _input_range(self) -> TokenRange:
        radius = self.options.input_radius
        return TokenRange() if radius is None else TokenRange(radius)

    def _fixed(self, layout: Layout, *, kind: Kind = Kind.FIXED, **fields) -> TensorState:
        nothing = Gain.none(self.options.norm)
        return TensorState(gain=nothing, published=nothing, kind=kind, **fields, **layout.fields())

    def _unchanged(self, layout: Layout, kind: Kind, interval: Interval) -> TensorState:
        """The state of a fixed tensor with entries in an interval."""
        low, high = interval
        token_range = TokenRange(largest=max(-low, high))
        width = layout.shape[-1] if layout.shape else 1
        bounded = math.isfinite(token_range.largest)
        if bounded and width is not None and not any(layout.dynamic[-1:]):
            token_range = TokenRange.of_entries(low, high, width)
        return self._fixed(layout, kind=kind, range=token_range, interval=interval)

    # Calls ------------------------------------------------------------------------------------

    def _apply(self, index: int, call: TracedCall) -> list[TensorState]:
        """States of the outputs of one call."""
        arguments = keras.tree.map_structure(self._fill, call.arguments)
        given = [self.state_of(tensor) for tensor in call.tensors]
        layouts = [self._layout(tensor) for tensor in call.outputs]
        perturbed = [state for state in given if not state.is_fixed]
        from_integers = any(state.kind in (Kind.FROM_INTEGERS, Kind.INTEGER) for state in given)
        if not perturbed and not reads_arguments_alone(call.operation, has_rule=not call.refusal):
            given = list(self.states.values())
            refusal = call.refusal or _READS_MORE
            return self._record(call, unbounded(refusal), given, layouts, index)
        if not perturbed and not (from_integers and _looks_up(call.operation)):
            kind = Kind.FROM_INTEGERS if from_integers else Kind.FIXED
            outputs = [
                self._unchanged(
                    layout,
                    kind,
                    interval_after(call.operation, arguments, layout.dtype),
                )
                for layout in layouts
            ]
            if not outputs[0].range.bounded:
                outputs[0] = self._ranged(index, call, arguments, outputs[0])
            return self._enclosed(index, None, given, outputs)
        refusal = call.refusal or self._comparison.refusals.get(index)
        if not refusal and any(layout.fold == 0 for layout in layouts):
            refusal = MOVES_BATCH
        if refusal:
            return self._record(call, unbounded(refusal), given, layouts, index)
        name = operation_name(call.operation)
        if name in _FILLED and len(perturbed) == 1 and arguments["x"] is perturbed[0]:
            interval = _FILLED[name]
            outputs = [self._unchanged(layout, Kind.FIXED, interval) for layout in layouts]
            return self._enclosed(index, None, given, outputs)
        masks = [
            leaf
            for argument, value in arguments.items()
            if is_mask(argument)
            for leaf in keras.tree.flatten(value)
        ]
        masks += [self.state_of(mask) for mask in call.keras_masks]
        if any(isinstance(mask, TensorState) and not mask.is_fixed for mask in masks):
            return self._record(call, unbounded(TAKES_MASK), given, layouts, index)
        if all(_is_integer(layout.dtype) for layout in layouts):
            return self._integers(index, call, given, layouts, arguments)
        rule_map = self._rules.ask(index, call, arguments, layouts[0])

        def ask(norm):
            return self._rules.ask(index, call, arguments, layouts[0], norm)

        return self._record(call, rule_map, given, layouts, index, ask)

    def _ranged(self, index, call: TracedCall, arguments, output: TensorState) -> TensorState:
        """The state of a fixed tensor with the range that a rule gives."""
        layout = self._layout(call.outputs[0])
        if not layout.fold or index in self._comparison.refusals or _is_integer(layout.dtype):
            return output
        # Rules expect tensors that change. The range does not depend on whether they do.
        perturbed = {
            id(leaf): leaf.replace(kind=Kind.PERTURBED)
            for leaf in keras.tree.flatten(list(arguments.values()))
            if isinstance(leaf, TensorState) and not _is_integer(leaf.dtype) and leaf.fold
        }
        if not perturbed:
            return output
        arguments = keras.tree.map_structure(lambda leaf: perturbed.get(id(leaf), leaf), arguments)
        rule_map = self._rules.ask(index, call, arguments, layout)
        if rule_map.resets_input or math.isinf(rule_map.constant):
            return output
        given = list(perturbed.values())
        after = rule_map.propagate(given, -1, self.options.norm, layout.fields())
        return output.replace(range=output.range.smaller(after.range))

    def _fill(self, leaf: Any) -> Any:
        return self.state_of(leaf) if isinstance(leaf, KerasTensor) else leaf

    def _integers(self, index, call, given, layouts, arguments) -> list[TensorState]:
        """Outputs that are integers or booleans: either constant or discontinuous."""
        perturbed = [state for state in given if not state.is_fixed]
        if all(state.kind is Kind.INTEGER for state in perturbed):
            outputs = self._moved(index, call, arguments, perturbed, layouts)
            if outputs is None:
                for state in perturbed:
                    self._look_up(state)
                outputs = [self._fixed(layout, kind=Kind.FROM_INTEGERS) for layout in layouts]
        elif self.options.assume_fixed_mask:
            self.assumed_masks.append(call.path)
            outputs = [self._fixed(layout) for layout in layouts]
        else:
            outputs = self._sign(call, arguments, layouts)
            if outputs is None:
                return self._record(call, unbounded(COMPUTES_INTEGERS), given, layouts, index)
        return self._enclosed(index, None, given, outputs)

    def _sign(self, call, arguments, layouts) -> list[TensorState] | None:
        """A comparison with 0 that is only a condition of `where`, `None` for anything else.

        It has no bound. The rule of `where` has one if both branches agree at 0.
        """
        pair = [arguments.get("x1"), arguments.get("x2")]
        tensors = [one for one in pair if isinstance(one, TensorState) and not one.is_fixed]
        others = [one for one in pair if not any(one is state for state in tensors)]
        if operation_name(call.operation) not in _COMPARISONS or len(tensors) != 1:
            return None
        zero = others[0].values if isinstance(others[0], TensorState) else others[0]
        (output,) = call.outputs
        if (
            zero is None
            or keras.ops.convert_to_numpy(zero).any()
            or not self.trace.is_only_a_condition(output)
        ):
            return None
        nothing = Gain.unbounded(self.options.norm, [tensors[0].gain])
        return [
            TensorState(
                gain=nothing,
                published=nothing,
                function_of=("sign", tensors[0], 1.0),
                **layout.fields(),
            )
            for layout in layouts
        ]

    def _moved(self, index, call, arguments, perturbed, layouts) -> list[TensorState] | None:
        """Integers of one input in another order or shape, `None` for anything else."""
        one_input = len({state.integer_input for state in perturbed}) == 1
        if operation_name(call.operation) not in _MOVES or not one_input:
            return None
        if not all(np.can_cast(perturbed[0].dtype, layout.dtype) for layout in layouts):
            # Large integers may wrap around.
            return None
        rule_map = self._rules.ask(index, call, arguments, layouts[0])
        if not rule_map.constant <= 1.0 or len(perturbed) > 1:
            return None
        return [
            perturbed[0].replace(
                anchor=None, linear=None, routes=(), enclosure=None, **layout.fields()
            )
            for layout in layouts
        ]

    def _look_up(self, state: TensorState) -> None:
        """Notes that this integer input is looked up, so that it stays fixed."""
        if state.integer_input is not None:
            name = self.inputs[state.integer_input]
            if state.integer_input not in self.looked_up_inputs:
                self.fixed_inputs.append(name)
            self.looked_up_inputs[state.integer_input] = name

    # Rows -------------------------------------------------------------------------------------

    def _record(
        self,
        call,
        rule_map: LipschitzMap,
        given,
        layouts,
        index,
        ask: Callable[[str], LipschitzMap] | None = None,
    ) -> list[TensorState]:
        """Adds the row of a call and returns the states of its outputs.

        `ask` returns its map in another norm.
        """
        perturbed = [state for state in given if not state.is_fixed]
        row = len(self.rows)
        path = self.rows.unique(call.path)
        name = type(call.operation).__name__
        if rule_map.resets_input:
            self.resets.add(index)
            for state in perturbed:
                self._look_up(state)
            gain = self._source(f"output of {name} {path!r}")
            outputs = [
                TensorState(gain=gain, published=gain, range=self._input_range(), **layout.fields())
                for layout in layouts
            ]
        else:
            for state in perturbed:
                if state.integer_input is not None and state.kind is Kind.INTEGER:
                    self.computed_inputs.add(state.integer_input)
            outputs = [
                rule_map.propagate(given, row, self.options.norm, layout.fields())
                for layout in layouts
            ]
            if ask is not None and perturbed and math.isfinite(rule_map.constant):
                outputs = self._norms.after(rule_map, ask, given, outputs, row)
        if rule_map.max_tokens is not None:
            self.max_tokens.append(rule_map.max_tokens)
        if rule_map.assumes_fixed_mask:
            self.assumed_masks.append(path)
        self.rows.add(index, call, path, rule_map, perturbed)
        return self._enclosed(index, rule_map, given, outputs)

    def _of_one_example(self, state: TensorState) -> TensorState:
        """The state of an output, without a bound unless it has one row for each example."""
        if state.fold == 1 or state.is_fixed or math.isinf(state.gain.log):
            return state
        reason = Reason(
            "the output of the model does not have one row for each example", cause=Cause.BATCH
        ).with_remedy(None, has_rule=False)
        layout = Layout(state.shape, state.dynamic, state.fold, state.dtype)
        return self.refuse("output", "output", reason, [state], layout)

    def refuse(
        self,
        path: str,
        layer_class: str,
        reason: Reason,
        states: Sequence[TensorState],
        layout: Layout = _NUMBER,
    ) -> TensorState:
        """Adds a row without a bound that belongs to no call; returns the state of its output."""
        self.rows.add_refusal(path, layer_class, reason)
        row = len(self.rows) - 1
        return unbounded(reason).propagate(states, row, self.options.norm, layout.fields())

    def _enclosed(self, index, rule_map, given, outputs) -> list[TensorState]:
        if self.local is None:
            return outputs
        enclosed = self.local.after(index, rule_map, given, outputs)
        return [
            after.replace(
                others={
                    norm: state.replace(enclosure=after.enclosure, range=after.range)
                    for norm, state in before.others.items()
                }
            )
            for before, after in zip(outputs, enclosed, strict=True)
        ]


def _looks_up(operation: Any) -> bool:
    if isinstance(operation, keras.layers.Layer):
        return isinstance(operation, keras.layers.Embedding)
    return operation_name(operation) == "Take"


def _is_integer(dtype: str) -> bool:
    return dtype == "bool" or dtype.startswith(("int", "uint"))
