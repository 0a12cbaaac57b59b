"""The record of a symbolic run of a model: a flat list of calls."""

import dataclasses
import functools
import inspect
from typing import Any

import keras
from keras import KerasTensor

from keras_lipattn.certification.class_code import operation_name
from keras_lipattn.certification.reasons import Reason


class TraceError(Exception):
    """A layer cannot be called on symbolic tensors.

    Args:
        reason: why.
    """

    # Keras then leaves the message as it is.
    _keras_call_info_injected = True

    def __init__(self, reason: Reason | str):
        self.reason = Reason.of(reason)
        super().__init__(self.reason.text)


@dataclasses.dataclass(eq=False, kw_only=True)
class TracedCall:
    """One call of a layer or of an operation.

    Args:
        operation: the layer, or the node of `keras.ops`.
        args: positional arguments; tensors are `KerasTensor`s.
        kwargs: keyword arguments, with masks and `training` as Keras passes them.
        outputs: the tensors it returns, flat.
        path: names of the layers that contain the call, and of the layer or operation.
        compute_dtype: dtype to which variables are cast, `None` for no cast.
        refusal: why the code of the layer could not be traced; `None` for calls with a rule.
        recorded: whether the operation belongs to the model, rather than to one run of its code.
        masks: for a layer, the masks attached to its tensors at the time of the call, by `id` of
            the tensor. Its `call` may read them.
    """

    operation: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[KerasTensor]
    path: str
    compute_dtype: str | None = None
    refusal: Reason | None = None
    recorded: bool = True
    masks: dict[int, KerasTensor] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments that were passed, by their names in the signature of `call`."""
        signature = inspect.signature(self.operation.call)
        try:
            bound = signature.bind(*self.args, **self.kwargs).arguments
        except TypeError:
            # A `call` that was replaced on the instance may not accept the arguments of Keras.
            return {**dict(zip(signature.parameters, self.args, strict=False)), **self.kwargs}
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in bound:
                bound.update(bound.pop(name))
        return dict(bound)

    @property
    def keras_masks(self) -> list[KerasTensor]:
        """The masks attached to its tensors."""
        return list(self.masks.values())

    @property
    def tensors(self) -> list[KerasTensor]:
        """All symbolic tensors among the arguments."""
        return symbols_in((self.args, self.kwargs))


@dataclasses.dataclass(eq=False, kw_only=True)
class Trace:
    """The calls of a model, as a flat list, each after the calls it depends on.

    Args:
        batch: number of examples the model was called on.
        inputs: the symbolic inputs, flat.
        outputs: the symbolic outputs, flat.
        calls: the calls.
        constants: values of tensors that do not depend on the inputs, by `id`.
        aliases: maps the `id` of a copy in another floating dtype to the original tensor.
        flexible: shapes by `id`, with `None` for axes whose size varies from call to call.
        exact_length: whether Python code of a layer ran on an axis whose size varies, so that the
            trace is valid only for this size.
    """

    batch: int
    inputs: list[KerasTensor]
    outputs: list[KerasTensor] = dataclasses.field(default_factory=list)
    calls: list[TracedCall] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    aliases: dict[int, KerasTensor] = dataclasses.field(default_factory=dict)
    flexible: dict[int, tuple[int | None, ...]] = dataclasses.field(default_factory=dict)
    exact_length: bool = False

    def resolve(self, tensor: KerasTensor) -> KerasTensor:
        """The original of a copy, or the tensor itself."""
        while id(tensor) in self.aliases:
            tensor = self.aliases[id(tensor)]
        return tensor

    def needed_calls(self) -> set[int]:
        """Indices of the calls that the outputs depend on."""
        producers = {
            id(tensor): index for index, call in enumerate(self.calls) for tensor in call.outputs
        }
        needed: set[int] = set()
        stack = list(self.outputs)
        while stack:
            index = producers.get(id(self.resolve(stack.pop())))
            if index is not None and index not in needed:
                needed.add(index)
                call = self.calls[index]
                stack += [*call.tensors, *call.keras_masks]
        return needed

    def last_uses(self) -> dict[int, list[KerasTensor]]:
        """By index of a call, the tensors that neither a later call nor an output needs."""
        last: dict[int, tuple[int, KerasTensor]] = {}
        for index, call in enumerate(self.calls):
            for tensor in map(self.resolve, (*call.tensors, *call.keras_masks)):
                last[id(tensor)] = index, tensor
        for tensor in self.outputs:
            last.pop(id(self.resolve(tensor)), None)
        uses: dict[int, list[KerasTensor]] = {}
        for index, tensor in last.values():
            uses.setdefault(index, []).append(tensor)
        return uses

    def is_only_a_condition(self, tensor: KerasTensor) -> bool:
        """Whether a tensor is used only as the condition of `keras.ops.where`."""
        if any(self.resolve(output) is tensor for output in self.outputs):
            return False
        for call in self.calls:
            used = sum(self.resolve(one) is tensor for one in (*call.tensors, *call.keras_masks))
            condition = call.arguments.get("condition")
            decides = operation_name(call.operation) == "Where" and isinstance(
                condition, KerasTensor
            )
            if used and not (used == 1 and decides and self.resolve(condition) is tensor):
                return False
        return True


def symbols_in(structure: Any) -> list[KerasTensor]:
    """All symbolic tensors in a structure."""
    return [leaf for leaf in keras.tree.flatten(structure) if isinstance(leaf, KerasTensor)]
