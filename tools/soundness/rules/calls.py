"""A call of a layer or operation, in all ways that Keras allows."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers
from keras.src import backend

from tools.soundness.rules.cases import ABSENT, Made, RuleCase


@dataclasses.dataclass(frozen=True)
class Style:
    """How arguments are passed.

    Args:
        positional: largest number of arguments passed by position.
        training: the argument `training`, `ABSENT` for none.
        backwards: whether keyword arguments come in reverse order.
    """

    positional: int
    training: Any
    backwards: bool


class Target:
    """A layer or operation with its arguments, to be called on tensors.

    Args:
        case: what is called.
        config: constructor arguments.
        arguments: call arguments that are not tensors.
        style: how arguments are passed.
    """

    def __init__(self, case: RuleCase, config: dict, arguments: dict, style: Style):
        self.case = case
        self.config = config
        self.arguments = arguments
        self.style = style
        made = {name: _value(choice) for name, choice in config.items()}
        self.layer: Any = case.make(**made) if case.is_layer else None
        call = self.layer.call if case.is_layer else case.make
        self.parameters = list(inspect.signature(call).parameters)

    @property
    def takes_training(self) -> bool:
        return "training" in self.parameters

    def __call__(self, tensors: Sequence[Any], masks: dict[str, Any]) -> Any:
        bound: dict[str, Any] = {}
        if len(tensors) < len(self.case.tensors):
            tensors = [*tensors] * len(self.case.tensors)
        if self.case.listed:
            bound[self.case.tensors[0]] = list(tensors)
        else:
            bound.update(zip(self.case.tensors, tensors, strict=True))
        bound.update(self.arguments)
        for name, mask in masks.items():
            bound[name] = [mask] * len(tensors) if self.case.listed else mask
        if self.style.training is not ABSENT and self.takes_training:
            bound["training"] = self.style.training
        args = []
        for name in self.parameters[: self.style.positional]:
            # Layers take only tensors by position.
            if name not in bound or (self.case.is_layer and not _is_tensor(bound[name])):
                break
            args.append(bound.pop(name))
        if self.style.backwards:
            bound = dict(reversed(bound.items()))
        function = self.layer if self.case.is_layer else self.case.make
        return function(*args, **bound)

    def __str__(self) -> str:
        name = self.case.name.removeprefix("ops:")
        if not self.case.is_layer and self.case.make.__name__ == "<lambda>":
            source = " ".join(inspect.getsource(self.case.make).split())
            name += f" by `{source}`"
        kind = "layer " if self.case.is_layer else "operation "
        config = [f"{key}={_text(value)}" for key, value in self.config.items()]
        call = [f"{key}={_text(value)}" for key, value in self.arguments.items()]
        if self.style.training is not ABSENT and self.takes_training:
            call.append(f"training={self.style.training}")
        made = f"({', '.join(config)})" if self.case.is_layer else ""
        how = f"{self.style.positional} by position"
        return f"{kind}{name}{made}({', '.join(['...', *call])}), {how}"


def draw(rng, choices: dict[str, Sequence]) -> dict[str, Any]:
    """A random choice for each argument, without absent ones."""
    drawn = {name: options[rng.integers(len(options))] for name, options in choices.items()}
    return {name: value for name, value in drawn.items() if value is not ABSENT}


def _value(choice: Any) -> Any:
    return choice.make() if isinstance(choice, Made) else choice


def _is_tensor(value: Any) -> bool:
    leaves = keras.tree.flatten(value)
    return all(keras.ops.is_tensor(leaf) or isinstance(leaf, keras.KerasTensor) for leaf in leaves)


def _text(value: Any) -> str:
    if isinstance(value, Made):
        return value.text
    if isinstance(value, np.ndarray):
        return f"np.array({value.tolist()})"
    return repr(value)


# Layers and models that hold a call --------------------------------------------------------------


class _Holds:
    """The `call` of layers and models that only call an inner target."""

    target: Any

    def hold(self, target):
        # Keras tracks only the layer.
        vars(self)["target"] = target
        self.inner = target.layer

    def call(self, first, second=None, third=None):
        tensors = [tensor for tensor in (first, second, third) if tensor is not None]
        return self.target(tensors, {})


class _HoldsMasks(_Holds):
    """Takes the mask of its first tensor as an argument and passes it on."""

    def call(self, first, second=None, third=None, first_mask=None):
        tensors = [tensor for tensor in (first, second, third) if tensor is not None]
        masks = {} if first_mask is None else dict.fromkeys(self.target.case.masks, first_mask)
        return self.target(tensors, masks)


class Custom(_Holds, layers.Layer):
    """A custom layer without `build`, as in most Keras examples."""

    def __init__(self, target):
        super().__init__()
        self.hold(target)


class CustomWithShape(Custom):
    """A custom layer with `compute_output_shape`, which `TimeDistributed` needs."""

    def compute_output_shape(self, input_shape):
        symbol = keras.KerasTensor(input_shape, dtype=self.compute_dtype)
        spec = backend.compute_output_spec(self.call, symbol)
        return spec.shape


class CustomWithBuild(_Holds, layers.Layer):
    """A custom layer that builds its inner layer."""

    def __init__(self, target):
        super().__init__()
        self.hold(target)

    def build(self, input_shape):
        if self.inner is not None and not self.inner.built:
            self.inner.build(input_shape)


class CustomWithMask(_HoldsMasks, layers.Layer):
    """A custom layer that takes the mask of its input as an argument."""

    def __init__(self, target):
        super().__init__()
        self.hold(target)


class CustomInCustom(layers.Layer):
    """A custom layer in a custom layer, both without `build`."""

    def __init__(self, target):
        super().__init__()
        self.block = Custom(target)

    def call(self, inputs, second=None, third=None):
        return self.block(inputs, second, third)


class SubclassedModel(_Holds, keras.Model):
    """A subclassed model."""

    def __init__(self, target):
        super().__init__()
        self.hold(target)


class SubclassedWithMask(_HoldsMasks, keras.Model):
    """A subclassed model that takes the mask of its input as an argument."""

    def __init__(self, target):
        super().__init__()
        self.hold(target)


class SetMask(layers.Layer):
    """Sets the mask of a tensor in `call`."""

    def call(self, inputs, visible):
        output = inputs * 1.0
        backend.set_keras_mask(output, visible)
        return output


class Outer(keras.Model):
    """A subclassed model around a whole model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, inputs):
        return self.model(inputs)
