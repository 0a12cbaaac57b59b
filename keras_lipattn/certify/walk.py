"""The walk over the graph of a model, from its inputs to its outputs."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.certify import graph
from keras_lipattn.certify.advance import advance
from keras_lipattn.certify.call import Call
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.gain import Gain
from keras_lipattn.certify.locality import Locality
from keras_lipattn.certify.near import Near
from keras_lipattn.certify.options import Options
from keras_lipattn.certify.paths import sibling_names
from keras_lipattn.certify.registry import find_rule
from keras_lipattn.certify.row_draft import RowDraft
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.layers._as_run import is_finite_as_run

_HOW_TO_ADD = (
    "Give it a rule with `@keras_lipattn.register_rule({cls})`: a function of the layer and of the "
    "call that returns a Lipschitz constant."
)
_HOW_TO_ADD_OPERATION = (
    "Put it into a layer of its own and give that layer a rule with `@keras_lipattn.register_rule`."
)

# Operations which move integers around and do not look at them.
_MOVES = frozenset(
    {
        "BroadcastTo",
        "Cast",
        "Concatenate",
        "ConvertToTensor",
        "ExpandDims",
        "Flatten",
        "GetItem",
        "Identity",
        "Permute",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Swapaxes",
        "Transpose",
    }
)


# Operations whose output depends on the shape of the input alone.
_FILLED = frozenset({"EmptyLike", "FullLike", "OnesLike", "ZerosLike"})


class Walk:
    """One certification: walks graphs, collects rows and inputs."""

    def __init__(self, options: Options, locality: Locality | None = None):
        self.options = options
        self.locality = locality
        self.rows: list[RowDraft] = []
        self.sources: list[str] = []
        self.held_inputs: dict[int, str] = {}
        self.relaxed_inputs: set[int] = set()
        self.assumed_masks: list[str] = []
        self.longest: list[int] = []
        self.held_names: list[str] = []
        self.logit_nodes: frozenset[int] = frozenset()
        self._paths: set[str] = set()
        self._compute_dtype: list[str | None] = [None]

    # Inputs -----------------------------------------------------------------------------------

    def source(self, name: str) -> Gain:
        """Registers a certified input and returns its gain."""
        self.sources.append(name)
        return Gain.of_source(self.options.norm, len(self.sources) - 1)

    def begin(self, states: Sequence[TensorState]) -> list[TensorState]:
        """The states of the inputs, with what a local certificate knows about them."""
        if self.locality is None:
            return list(states)
        states = [
            state.replace(shape=shape, dynamic=(False,) * len(shape))
            for state, shape in zip(states, self.locality.shapes, strict=True)
        ]
        return self.locality.begin(states)

    def input_state(self, name: str, shape: Sequence[int | None], dtype: str) -> TensorState:
        """The state of an input of the model; `shape` comes without the batch axis."""
        unknown = [axis for axis, size in enumerate(shape) if size is None]
        sizes = [
            self.options.sequence_length if size is None and len(unknown) == 1 else size
            for size in shape
        ]
        geometry: dict[str, Any] = dict(
            shape=tuple(sizes), dynamic=tuple(size is None for size in shape), dtype=dtype
        )
        if dtype == "bool":
            self.held_names.append(name)
            return self._held(**geometry)
        gain = self.source(name)
        discrete = len(self.sources) - 1 if _is_integer(dtype) else None
        radius = self.options.input_radius
        domain = Domain() if radius is None else Domain(radius)
        return TensorState(gain=gain, published=gain, domain=domain, discrete=discrete, **geometry)

    def _held(self, **fields) -> TensorState:
        nothing = Gain.none(self.options.norm)
        return TensorState(gain=nothing, published=nothing, held=True, **fields)

    def mask_state(self, state: TensorState) -> TensorState:
        """The mask that travels with a tensor, as a tensor: one boolean per token."""
        mask = self._held(
            shape=state.shape[:1], dynamic=state.dynamic[:1], dtype="bool", derived=True
        )
        if state.near is None:
            return mask
        value = state.near.mask
        return mask.replace(
            near=Near(np.ones(state.near.value.shape[:2], bool) if value is None else value)
        )

    # Graphs -----------------------------------------------------------------------------------

    def run(
        self,
        function: keras.Function,
        inputs: Sequence[TensorState],
        prefix: str,
        parent: keras.layers.Layer,
        *,
        traced: bool,
    ) -> list[TensorState]:
        """Walks a graph.

        Args:
            function: the graph.
            inputs: states of its inputs.
            prefix: path of the model or layer it belongs to, empty or with a final "/".
            parent: that model or layer.
            traced: whether the graph came from calling a layer, so that the names of its
                operations were made up.

        Returns:
            The states of its outputs, in order.
        """
        states = {id(tensor): state for tensor, state in zip(function.inputs, inputs, strict=True)}
        names = sibling_names(parent)
        for node in graph.nodes_in_order(function):
            operation = node.operation
            args, kwargs = graph.arguments_of(node, states)
            made_up = traced and not isinstance(operation, keras.layers.Layer)
            name = names.get(id(operation), str(operation.name))
            if made_up:
                name = type(operation).__name__.lower()
            outputs = self.apply(
                operation, args, kwargs, node.outputs, prefix + name, id(node) in self.logit_nodes
            )
            states.update(
                (id(tensor), state) for tensor, state in zip(node.outputs, outputs, strict=True)
            )
        return [states[id(tensor)] for tensor in function.outputs]

    def apply(
        self,
        operation: Any,
        args: tuple,
        kwargs: dict,
        tensors: Sequence[Any],
        path: str,
        drop_activation: bool = False,
    ) -> list[TensorState]:
        """States of the outputs of one call."""
        given = [
            leaf for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, TensorState)
        ]
        layouts = self._layouts(operation, args, kwargs, tensors, given)
        inner = graph.function_of(operation) if isinstance(operation, keras.Model) else None
        if inner is not None:
            return self._nested(operation, inner, args, given, path, layouts)
        derived = any(state.derived or state.discrete is not None for state in given)
        if all(state.held for state in given) and not (
            derived and (isinstance(operation, keras.layers.Embedding) or _is_lookup(operation))
        ):
            # Booleans are 0 or 1, and so are the numbers made of them.
            moves = type(operation).__name__ in _MOVES
            largest = max(_largest(state) for state in given) if moves else math.inf
            domain = Domain(largest=largest)
            held = [self._held(derived=derived, domain=domain, **layout) for layout in layouts]
            return self._localise(held, operation, args, kwargs, None, path)
        integers = [_is_integer(layout["dtype"]) for layout in layouts]
        if all(integers):
            moved = self._integers(operation, given, layouts, path)
            return self._localise(moved, operation, args, kwargs, None, path)
        call = self._call(operation, args, kwargs, layouts[0], path, drop_activation)
        rule, missing = find_rule(operation)
        if rule is None:
            if isinstance(operation, keras.layers.Layer):
                return self._by_tracing(operation, args, kwargs, given, path, layouts, missing)
            step = Step(constant=math.inf, reason=missing)
        else:
            answer = rule(operation, call)
            if isinstance(answer, TensorState):
                if self.locality is not None and answer.near is None:
                    self.locality.lose(path, "it is not known what it makes of its input", given)
                return [answer]
            step = _as_step(answer)
        outputs = self.record(operation, step, given, path, layouts)
        return self._localise(outputs, operation, args, kwargs, step, path)

    def _localise(self, outputs, operation, args, kwargs, step, path) -> list[TensorState]:
        if self.locality is None:
            return outputs
        is_layer = isinstance(operation, keras.layers.Layer)
        dtype = operation.compute_dtype if is_layer else self._compute_dtype[-1]
        return self.locality.after(operation, args, kwargs, step, outputs, path, dtype)

    def ask(self, layer: keras.layers.Layer, state: TensorState) -> Step:
        """The step of a layer on one input, for wrappers."""
        layout = dict(shape=state.shape, dynamic=state.dynamic, dtype=state.dtype)
        rule, missing = find_rule(layer)
        if rule is None:
            return Step(
                constant=math.inf,
                reason=f"{type(layer).__name__} {layer.name!r} inside it: {missing}",
            )
        return _as_step(rule(layer, self._call(layer, (state,), {}, layout, layer.name, False)))

    def walk_into(self, layer: keras.layers.Layer, state: TensorState, prefix: str) -> TensorState:
        """The state of the output of a layer inside another one."""
        output = graph.symbol(state)
        with contextlib.suppress(*graph.TRACE_ERRORS):
            output = layer.compute_output_spec(output)
        (after,) = self.apply(layer, (state,), {}, [output], f"{prefix}/{layer.name}")
        return after

    def _call(self, operation, args, kwargs, layout, path, drop_activation) -> Call:
        is_layer = isinstance(operation, keras.layers.Layer)
        return Call(
            norm=self.options.norm,
            args=args,
            kwargs=kwargs,
            shape=layout["shape"],
            dynamic=layout["dynamic"],
            output_dtype=layout["dtype"],
            compute_dtype=operation.compute_dtype if is_layer else self._compute_dtype[-1],
            mask=self.options.mask,
            assume_fixed_mask=self.options.assume_fixed_mask,
            drop_activation=drop_activation,
            ask=self.ask,
            walk_into=lambda layer, state: self.walk_into(layer, state, path),
        )

    # Kinds of calls ---------------------------------------------------------------------------

    def _nested(self, model, function, args, given, path, layouts) -> list[TensorState]:
        flat = keras.tree.flatten(args[0]) if args else given
        if len(flat) != len(function.inputs) or not all(
            isinstance(leaf, TensorState) for leaf in flat
        ):
            step = Step(constant=math.inf, reason="it is called on inputs that are not all tensors")
            return self.record(model, step, given, path, layouts)
        return self.run(function, flat, f"{path}/", model, traced=False)

    def _by_tracing(self, layer, args, kwargs, given, path, layouts, missing) -> list[TensorState]:
        """A layer without a rule is walked through what it does."""
        try:
            function, inputs = graph.trace(layer, args, kwargs, self.mask_state)
        except graph.TraceError as error:
            step = Step(constant=math.inf, reason=f"{missing}, and {error}")
            return self.record(layer, step, given, path, layouts)
        self._compute_dtype.append(layer.compute_dtype)
        try:
            outputs = self.run(function, inputs, f"{path}/", layer, traced=True)
        finally:
            self._compute_dtype.pop()
        if any(state.near is not None and state.near.mask is not None for state in given):
            if self.locality is not None:
                self.locality.lose(path, "which mask comes out is its own affair", given)
            return [state.replace(near=None) for state in outputs]
        return outputs

    def _integers(self, operation, given, layouts, path) -> list[TensorState]:
        """Outputs that are integers or booleans: they do not move, or they jump."""
        moving = [state for state in given if not state.held]
        if all(state.discrete is not None for state in moving):
            moves = type(operation).__name__ in _MOVES
            if moves and len({state.discrete for state in moving}) == 1:
                return [moving[0].replace(anchor=None, linear=None, **lay) for lay in layouts]
            for state in moving:
                self.hold(state)
            filled = type(operation).__name__ in _FILLED
            return [self._held(derived=not filled, **layout) for layout in layouts]
        if type(operation).__name__ in _FILLED:
            return [self._held(**layout) for layout in layouts]
        if self.options.assume_fixed_mask:
            self.assumed_masks.append(path)
            return [self._held(**layout) for layout in layouts]
        step = Step(
            constant=math.inf,
            reason="it computes integers or a mask from a certified input, which jump when the "
            "input moves; `assume_fixed_mask=True` certifies for a fixed mask",
        )
        return self.record(operation, step, given, path, layouts)

    def hold(self, state: TensorState) -> None:
        """Notes that the certificate keeps this integer input fixed."""
        if state.discrete is not None:
            name = self.sources[state.discrete]
            if state.discrete not in self.held_inputs:
                self.held_names.append(name)
            self.held_inputs[state.discrete] = name

    # Steps ------------------------------------------------------------------------------------

    def record(self, operation, step: Step, given, path, layouts) -> list[TensorState]:
        """Adds the row of a call and returns the states of its outputs."""
        moving = [state for state in given if not state.held]
        row = len(self.rows)
        path = self._unique(path)
        cls = type(operation).__name__
        if step.starts:
            for state in moving:
                self.hold(state)
            gain = self.source(f"output of {cls} {path!r}")
            radius = self.options.input_radius
            outputs = [
                TensorState(
                    gain=gain,
                    published=gain,
                    domain=Domain() if radius is None else Domain(radius),
                    masked=step.adds_mask,
                    **layout,
                )
                for layout in layouts
            ]
        else:
            for state in moving:
                if state.discrete is not None:
                    self.relaxed_inputs.add(state.discrete)
            masked = step.adds_mask or (step.keeps_mask and any(state.masked for state in given))
            outputs = [
                advance(step, given, row, masked=masked, norm=self.options.norm, **layout)
                for layout in layouts
            ]
        if step.longest is not None:
            self.longest.append(step.longest)
        if step.assumes_fixed_mask:
            self.assumed_masks.append(path)
        reason = step.reason
        if math.isinf(step.constant):
            reason = f"{cls} {path!r}: {reason}. {_way_out(operation)}".rstrip()
        self.rows.append(
            RowDraft(
                path=path,
                layer_class=cls,
                constant=step.constant,
                published=step.published,
                radius=max((state.domain.radius for state in moving), default=0.0),
                tokens=moving[0].tokens if moving else None,
                theorem=step.theorem,
                reason=reason,
                exact=step.exact,
            )
        )
        return outputs

    def _unique(self, path: str) -> str:
        candidate, calls = path, 1
        while candidate in self._paths:
            calls += 1
            candidate = f"{path}:call{calls}"
        self._paths.add(candidate)
        return candidate

    # Shapes -----------------------------------------------------------------------------------

    def _layouts(self, operation, args, kwargs, tensors, given) -> list[dict[str, Any]]:
        """Shape, varying axes and dtype of every output."""
        recorded = [tuple(tensor.shape[1:]) for tensor in tensors]
        dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors]
        if any(None in shape for shape in recorded):
            try:
                largest = graph.infer_shapes(operation, args, kwargs, largest=True)
                varying = graph.infer_shapes(operation, args, kwargs, largest=False)
            except graph.TraceError:
                largest = varying = recorded
        else:
            largest = varying = recorded
        return [
            dict(
                shape=top,
                dynamic=tuple(size is None for size in some),
                dtype=dtype,
            )
            for top, some, dtype in zip(largest, varying, dtypes, strict=True)
        ]


def _as_step(answer: Any) -> Step:
    if isinstance(answer, Step):
        return answer
    value = float(answer)
    return Step(
        constant=value,
        theorem="as its rule states",
        reason="its rule returns no finite constant" if not math.isfinite(value) else "",
    )


def _way_out(operation: Any) -> str:
    """What gives the call a constant, empty where no rule could."""
    if not isinstance(operation, keras.layers.Layer):
        return _HOW_TO_ADD_OPERATION
    if not all(is_finite_as_run(weight, operation.compute_dtype) for weight in operation.weights):
        return ""
    return _HOW_TO_ADD.format(cls=type(operation).__name__)


def _is_lookup(operation: Any) -> bool:
    return not isinstance(operation, keras.layers.Layer) and type(operation).__name__ == "Take"


def _largest(state: TensorState) -> float:
    return 1.0 if state.dtype == "bool" else state.domain.largest


def _is_integer(dtype: str) -> bool:
    return dtype == "bool" or dtype.startswith(("int", "uint"))
