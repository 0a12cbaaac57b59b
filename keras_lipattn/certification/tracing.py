"""Reading what a model does, by letting Keras run it on symbolic tensors.

The model is called on `keras.KerasTensor`s, so that Keras itself binds arguments, fills in masks,
resolves `training` and matches the inputs of nested models. A layer with a rule becomes one call;
the code of every other layer runs on symbols as well, down to the operations of `keras.ops`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import KerasTensor
from keras.src import backend

from keras_lipattn.certification.class_code import (
    changes_of,
    has_known_shapes,
    operation_name,
    overrides_call_operator,
)
from keras_lipattn.certification.keras_models import (
    augments,
    function_of,
    nodes_in_order,
    recorded_operations,
    sibling_names,
)
from keras_lipattn.certification.reasons import NOT_QUANTIZED, Cause, Reason
from keras_lipattn.certification.restoring import (
    conversions_as_on_data,
    restored,
    weights_as_they_are,
    weights_before_symbols,
)
from keras_lipattn.certification.trace import Trace, TracedCall, TraceError, symbols_in

# Errors that code written for data may raise on symbols.
TRACE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

_CHANGES_STATE = Reason(
    "it changes its state or draws random numbers at inference",
    remedy="do that only when `training` is true",
)
_CHANGES_LAYER = (
    "a layer's weights or attributes are replaced while the model is called, so its rule does not "
    "apply"
)
_UNTRACKED = Reason(
    "it calls a layer that Keras does not find in it",
    remedy="create the layer in `__init__` and store it as an attribute",
)
_OTHER_SHAPES = Reason(
    "its code returns other shapes than its `compute_output_shape` says",
    remedy="correct that method, or the shapes of its weights",
)
_TENSOR_IN_LAYER = "an attribute of a layer is a tensor that a model computes"
_RUNS_FUNCTION = "an operation runs a function, which may use any tensor of the model"
# Attributes of a layer that Keras changes in a call, or that this module does.
_OF_KERAS = frozenset({"_called", "_call_context_args", "build", "built", "symbolic_call"})
# Attributes of an operation that do not change what it computes.
_NODES = frozenset({"_auto_config", "_inbound_nodes", "_lock", "_outbound_nodes", "name"})
# Operations that return their input, perhaps in another dtype.
_COPIES = ("Cast", "ConvertToTensor", "Copy", "SaturateCast", "StopGradient")


# Maps the class of a wrapper to a function that runs its inner layer on symbols.
EXPANSIONS: dict[type, Callable] = {}


def register_expansion(layer_class: type) -> Callable[[Callable], Callable]:
    """Registers a replacement for the `call` of a layer on symbols, as a decorator."""

    def decorate(function: Callable) -> Callable:
        EXPANSIONS[layer_class] = function
        return function

    return decorate


def trace(
    model: keras.Model,
    arguments: tuple,
    *,
    batch: int,
    refusal_of: Callable[[Any], str],
    flexible: Sequence[tuple[int | None, ...]] | None = None,
    training: bool | None = None,
) -> Trace:
    """Calls a model on symbolic tensors at inference and returns its trace.

    The model and its inner layers do not change.

    Args:
        model: a built model.
        arguments: as returned by `call_specs`, with sizes filled in where they are known.
        batch: number of examples where the batch axis has no fixed size.
        refusal_of: maps a layer to the reason why it has no rule, empty if it has one.
        flexible: shapes of the inputs with `None` for axes whose size varies; by default their
            own shapes.
        training: passed on to the model if it is not `None`.

    Returns:
        A `Trace`.

    Raises:
        TraceError: if the model cannot be called on symbols, or changes its state when called.
    """
    symbols = keras.tree.map_structure(
        lambda leaf: KerasTensor(
            (batch if leaf.shape[0] is None else leaf.shape[0], *leaf.shape[1:]), dtype=leaf.dtype
        ),
        arguments,
    )
    tracer = _Tracer(model, keras.tree.flatten(symbols), batch, refusal_of)
    for tensor, shape in zip(tracer.trace.inputs, flexible or [], strict=bool(flexible)):
        tracer.trace.flexible[id(tensor)] = (tensor.shape[0], *shape)
    with restored(model), conversions_as_on_data(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scope = keras.StatelessScope(collect_losses=True)
        unchanged = weights_as_they_are(_CHANGES_LAYER, lambda: tracer.runs_code)
        with scope, unchanged, weights_before_symbols():
            tracer.run(symbols, {} if training is None else {"training": training})
    return tracer.trace


class _Tracer:
    """One symbolic run of a model."""

    def __init__(self, model, inputs: list[KerasTensor], batch: int, refusal_of):
        self.trace = Trace(batch=batch, inputs=inputs)
        self._model = model
        self._refusal_of = refusal_of
        self._producers: dict[int, Any] = {id(tensor): None for tensor in inputs}
        # The operation of each tensor, which changes if another one returns the tensor too.
        self._operations: dict[int, Any] = dict.fromkeys(self._producers)
        # Ids are only unique among tensors that live.
        self._alive: list[Any] = list(inputs)
        self._stack: list[_Frame] = []
        self._recorded = recorded_operations(model)
        self._trained = _called_in_training(model)
        # False while Keras runs a layer for the shapes of its outputs alone.
        self.runs_code = True
        self._attributes = {id(layer): dict(vars(layer)) for layer in model._flatten_layers()}

    def run(self, symbols: tuple, options: dict[str, Any]) -> None:
        if overrides_call_operator(self._model):
            raise TraceError(Reason("it overrides `__call__`", remedy="use `call` for this code"))
        for layer in self._model._flatten_layers():
            vars(layer)["symbolic_call"] = functools.partial(self._call, layer)
        try:
            outputs = self._model(*symbols, **options)
        except TRACE_ERRORS as error:
            raise TraceError(_explain(error)) from error
        for call in self.trace.calls:
            if isinstance(call.operation, keras.layers.Layer) and not call.refusal:
                self._require_unchanged(call.operation)
        self.trace.outputs = symbols_in(outputs)
        self._collect(self.trace.outputs)
        if len(self.trace.outputs) != len(keras.tree.flatten(outputs)):
            raise TraceError("it returns values that are not tensors")

    def _call(self, layer: keras.layers.Layer, *args, **kwargs) -> Any:
        """Replaces `symbolic_call` of a layer; Keras has filled in the arguments."""
        self._collect(symbols_in((args, kwargs)))
        if id(layer) in self._trained and layer._call_has_training_arg:
            kwargs["training"] = True
        missing = self._refusal_of(layer)
        if not missing:
            self._require_unchanged(layer)
            return self._record(layer, args, kwargs)
        state = set(backend.get_stateless_scope().state_mapping)
        calls = len(self.trace.calls)
        exact_length = self.trace.exact_length
        refusal = self._refuse_lengths(layer, (args, kwargs))
        if not refusal:
            self._stack.append(self._frame(layer))
            try:
                outputs = self._run_inside(layer, args, kwargs)
                self._collect(symbols_in(outputs))
            except (TraceError, *TRACE_ERRORS) as error:
                refusal = error.reason if isinstance(error, TraceError) else _explain(error)
            else:
                changed = set(backend.get_stateless_scope().state_mapping) - state
                if not changed:
                    return outputs
                refusal = _CHANGES_STATE
            finally:
                self._stack.pop()
        if layer is self._model:
            raise TraceError(refusal)
        # Drop the calls before the failure: the layer becomes one call without a constant.
        del self.trace.calls[calls:]
        self.trace.exact_length = exact_length
        _forget_changes(state)
        refusal = dataclasses.replace(refusal, text=f"{missing}, and {refusal.text}")
        return self._record(layer, args, kwargs, refusal=refusal)

    def _require_unchanged(self, layer: keras.layers.Layer) -> None:
        """Raises a `TraceError` if a rule would read other weights than those that run."""
        for inner in layer._flatten_layers():
            before, now = self._attributes.get(id(inner), {}), vars(inner)
            names = (before.keys() | now.keys()) - _OF_KERAS
            if any(before.get(name) is not now.get(name) for name in names):
                raise TraceError(_CHANGES_LAYER)
            is_input = isinstance(inner, keras.layers.InputLayer)
            if not is_input and any(isinstance(value, KerasTensor) for value in now.values()):
                raise TraceError(_TENSOR_IN_LAYER)

    def _run_inside(self, layer, args, kwargs) -> Any:
        expand = _expansion_of(layer)
        if getattr(layer, "quantization_mode", None) is not None:
            raise TraceError(Reason("it is quantized", remedy=NOT_QUANTIZED))
        outputs = expand(layer, *args, **kwargs) if expand else layer.call(*args, **kwargs)
        # Outputs that do not depend on the inputs are constants, but Keras expects tensors.
        return keras.tree.map_structure(self._symbol, outputs)

    def _symbol(self, leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, KerasTensor):
            return leaf
        value = keras.ops.convert_to_tensor(leaf)
        tensor = KerasTensor(tuple(value.shape), dtype=keras.backend.standardize_dtype(value.dtype))
        self.trace.constants[id(tensor)] = value
        self._producers[id(tensor)] = None
        self._operations[id(tensor)] = None
        self._alive.append(tensor)
        return tensor

    def _refuse_lengths(self, layer, arguments) -> Reason | None:
        """Notes that Python code runs on a size that varies; a reason if the size is not known."""
        if _is_graph(layer) or _expansion_of(layer):
            return None
        tensors = symbols_in(arguments)
        if any(None in tensor.shape for tensor in tensors):
            return Reason("its result may depend on the length of its input", cause=Cause.SIZE)
        if any(None in self._flexible_shape(tensor) for tensor in tensors):
            self.trace.exact_length = True
        return None

    def _record(self, layer, args, kwargs, refusal: Reason | None = None) -> Any:
        given = [(tensor, backend.get_keras_mask(tensor)) for tensor in symbols_in((args, kwargs))]
        self.runs_code = False
        try:
            outputs = type(layer).symbolic_call(layer, *args, **kwargs)
            if not refusal and not has_known_shapes(layer):
                refusal = _refuse_shapes(layer, args, kwargs, outputs)
        finally:
            self.runs_code = True
        # A layer may return its input itself.
        fresh = keras.tree.map_structure(
            lambda leaf: (
                KerasTensor(leaf.shape, leaf.dtype) if id(leaf) in self._producers else leaf
            ),
            outputs,
        )
        self._add(
            TracedCall(
                operation=layer,
                args=args,
                kwargs=kwargs,
                outputs=symbols_in(fresh),
                path=self._path(layer),
                compute_dtype=layer.compute_dtype,
                refusal=refusal,
                masks={id(one): mask for one, mask in given if isinstance(mask, KerasTensor)},
            )
        )
        if isinstance(layer, keras.layers.ReversibleEmbedding) and not kwargs.get("reverse"):
            # Its `call` sets the mask; its `compute_mask` does not.
            (looked_up,) = symbols_in((args, kwargs))[:1]
            mask = keras.layers.Embedding.compute_mask(layer, looked_up)
            backend.set_keras_mask(fresh, mask)
        return fresh

    def _add(self, call: TracedCall) -> None:
        for tensor in call.outputs:
            self._producers[id(tensor)] = call
            self._operations[id(tensor)] = _operation_of(tensor)
        self._alive += call.outputs
        self.trace.calls.append(call)
        self._infer_flexible(call)

    def _collect(self, tensors: Sequence[KerasTensor]) -> None:
        """Adds the operations that produced tensors since the last call of a layer."""
        stack = [*reversed(tensors)]
        while stack:
            tensor = stack[-1]
            if id(tensor) in self._producers:
                if _operation_of(tensor) not in (None, self._operations[id(tensor)]):
                    raise TraceError(_RUNS_FUNCTION)
                stack.pop()
                mask = backend.get_keras_mask(tensor)
                if isinstance(mask, KerasTensor) and id(mask) not in self._producers:
                    stack.append(mask)
                continue
            history = getattr(tensor, "_keras_history", None)
            if history is None or history.operation is None:
                raise TraceError("it uses a symbolic tensor from outside the model")
            node = history.operation._inbound_nodes[history.node_index]
            waiting = [one for one in node.input_tensors if id(one) not in self._producers]
            is_layer = isinstance(node.operation, keras.layers.Layer)
            if is_layer and node.input_tensors and not waiting:
                raise TraceError(_UNTRACKED)
            if is_layer or not node.input_tensors:
                raise TraceError("it uses a symbolic tensor from outside the model")
            if waiting:
                stack += reversed(waiting)
                continue
            self._add_operation(node)

    def _add_operation(self, node: Any) -> None:
        operation = node.operation
        outputs = node.outputs
        hidden = _hidden_dependency(operation, node.arguments)
        if hidden:
            raise TraceError(hidden)
        if _copies_a_number(operation, node.input_tensors, outputs):
            # Real arithmetic does not round.
            (source,) = node.input_tensors
            self.trace.aliases[id(outputs[0])] = source
            self._producers[id(outputs[0])] = self._producers[id(source)]
            self._operations[id(outputs[0])] = _operation_of(outputs[0])
            self._alive.append(outputs[0])
            self.trace.flexible[id(outputs[0])] = self._flexible_shape(source)
            return
        frame = self._stack[-1]
        self._add(
            TracedCall(
                operation=operation,
                args=tuple(node.arguments.args),
                kwargs=dict(node.arguments.kwargs),
                outputs=list(outputs),
                path=self._path(operation),
                compute_dtype=frame.autocast_dtype,
                recorded=id(operation) in self._recorded,
            )
        )

    # Sizes that vary --------------------------------------------------------------------------

    def _flexible_shape(self, tensor: KerasTensor) -> tuple[int | None, ...]:
        return self.trace.flexible.get(id(tensor), tuple(tensor.shape))

    def _infer_flexible(self, call: TracedCall) -> None:
        """Shapes of the outputs with `None` where the size varies."""
        if self.trace.exact_length or not self.trace.flexible:
            return
        if all(self._flexible_shape(one) == tuple(one.shape) for one in call.tensors):
            return

        def fill(leaf):
            if not isinstance(leaf, KerasTensor):
                return leaf
            return KerasTensor(self._flexible_shape(leaf), dtype=leaf.dtype)

        args, kwargs = (keras.tree.map_structure(fill, part) for part in (call.args, call.kwargs))
        try:
            shapes = [
                tuple(leaf.shape)
                for leaf in keras.tree.flatten(call.operation.compute_output_spec(*args, **kwargs))
            ]
        except TRACE_ERRORS:
            shapes = [(None,) * len(tensor.shape) for tensor in call.outputs]
        for tensor, shape in zip(call.outputs, shapes, strict=True):
            if len(shape) != len(tensor.shape):
                shape = (None,) * len(tensor.shape)
            self.trace.flexible[id(tensor)] = shape
            if shape and shape[0] is None:
                # A varying number of tokens was moved into the batch axis.
                self.trace.exact_length = True

    # Names ------------------------------------------------------------------------------------

    def _frame(self, layer) -> "_Frame":
        path = "" if layer is self._model else f"{self._path(layer)}/"
        scope = backend.get_autocast_scope()
        return _Frame(path, sibling_names(layer), scope.dtype if scope is not None else None)

    def _path(self, operation: Any) -> str:
        frame = self._stack[-1] if self._stack else _Frame("", {}, None)
        name = frame.names.get(id(operation))
        if name is None:
            kept = isinstance(operation, keras.layers.Layer) or id(operation) in self._recorded
            name = str(operation.name) if kept else type(operation).__name__.lower()
        return frame.path + name


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A layer whose code is being traced."""

    path: str
    names: dict[int, str]
    autocast_dtype: str | None


def _is_graph(layer: keras.layers.Layer) -> bool:
    """Whether the layer runs a recorded graph and no code of its own."""
    return (
        isinstance(layer, keras.Model) and function_of(layer) is not None and not changes_of(layer)
    )


def _refuse_shapes(layer, args, kwargs, outputs) -> Reason | None:
    """A reason if the code of a layer does not return the shapes that the layer says."""
    try:
        found = backend.compute_output_spec(layer.call, *args, **kwargs)
    except TRACE_ERRORS as error:
        return _explain(error)
    says, does = ([tuple(one.shape) for one in symbols_in(part)] for part in (outputs, found))
    return None if says == does else _OTHER_SHAPES


def _expansion_of(layer: keras.layers.Layer) -> Callable | None:
    """The replacement for the `call` of a layer that runs the code of its class."""
    return None if changes_of(layer) else EXPANSIONS.get(type(layer))


def _called_in_training(model: keras.Model) -> set[int]:
    """Layers that a graph calls with `training=True`, by `id`.

    `model(x)` runs them as in training, `model(x, training=False)` does not. Layers for image
    augmentation have `training=True` by default, and graphs record it. These are certified at
    inference, as `predict` and exported models run them.
    """
    graphs = [
        function_of(layer) for layer in model._flatten_layers() if isinstance(layer, keras.Model)
    ]
    return {
        id(node.operation)
        for graph in graphs
        if graph is not None
        for node in nodes_in_order(graph)
        if isinstance(node.operation, keras.layers.Layer)
        and not augments(node.operation)
        and (
            node.arguments.kwargs.get("training") or any(one is True for one in node.arguments.args)
        )
    }


def _copies_a_number(operation, inputs, outputs) -> bool:
    if operation_name(operation) not in _COPIES or len(inputs) != 1:
        return False
    dtypes = [keras.backend.standardize_dtype(one.dtype) for one in (*inputs, *outputs)]
    return dtypes[0] == dtypes[1] or all(map(keras.backend.is_float_dtype, dtypes))


def _hidden_dependency(operation, arguments) -> str:
    """Why an operation may depend on other tensors than those of its arguments, empty if not."""
    kept = [
        value for name, value in vars(operation).items() if name not in _NODES and value is not None
    ]
    leaves = keras.tree.flatten((kept, arguments.args, arguments.kwargs))
    if symbols_in(kept):
        return "a parameter of an operation is a tensor that the model computes"
    if any(callable(leaf) and not isinstance(leaf, KerasTensor | type) for leaf in leaves):
        return _RUNS_FUNCTION
    return ""


def _operation_of(tensor: KerasTensor) -> Any:
    """The operation that Keras noted last as that of a tensor, `None` for a layer or none."""
    operation = getattr(getattr(tensor, "_keras_history", None), "operation", None)
    return None if isinstance(operation, keras.layers.Layer) else operation


def _explain(error: Exception) -> Reason:
    """The reason why code cannot be traced. Messages of Keras are about building models."""
    if isinstance(error, NotImplementedError):
        return Reason("its `call` is not implemented")
    return Reason(
        f"its code raises {type(error).__name__} on symbolic tensors of this shape, for instance "
        "because it uses functions other than those of `keras.ops` or looks at the values of its "
        "input",
        cause=Cause.CODE,
    )


def _forget_changes(before: set) -> None:
    mapping = backend.get_stateless_scope().state_mapping
    for key in [key for key in mapping if key not in before]:
        del mapping[key]
