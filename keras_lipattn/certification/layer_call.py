"""The call of a layer that a rule gets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.maps import LipschitzMap
from keras_lipattn.certification.tensor_state import Kind, TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import cast_to_compute_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of a layer or operation in a traced model.

    Args:
        norm: norm of the certificate: `"l2"`, `"token"` or `"linf"`.
        arguments: all arguments that were passed, by their names in the signature of `call`, with a
            `TensorState` for every tensor. Masks and `training` are as Keras passes them.
        shape: sizes of the axes of the first output after the first axis: the largest sizes where
            they vary, `None` where they are not known.
        dynamic: for each of these axes, whether the size varies.
        fold: entries of the first axis of the output per example, see `TensorState`.
        output_dtype: dtype of the first output.
        compute_dtype: dtype to which variables are cast.
        mask: the argument `mask` of `certify`.
        assume_fixed_mask: the argument `assume_fixed_mask` of `certify`.
        drop_activation: whether the map is needed without the last softmax or sigmoid.
        keras_masks: masks attached to tensors among the arguments, which `call` may read.
        ask: a function of a layer and the state of its input that returns the map of that layer.

    Example:

    >>> class Scaled(keras.layers.Layer):
    ...     def call(self, x, scale=1.0):
    ...         return scale * x
    >>> @keras_lipattn.register_rule(Scaled)
    ... def scaled(layer, call):
    ...     print(call.norm, call.shape, call.training)
    ...     return abs(call.argument("scale", 1.0))
    >>> inputs = keras.Input((6, 8))
    >>> model = keras.Model(inputs, Scaled()(inputs, scale=3.0))
    >>> round(keras_lipattn.certify(model, norm="token").total, 6)
    token (6, 8) False
    3.0
    """

    norm: str
    arguments: Mapping[str, Any]
    shape: tuple[int | None, ...]
    dynamic: tuple[bool, ...]
    fold: int
    output_dtype: str
    compute_dtype: str | None = None
    mask: Any = None
    assume_fixed_mask: bool = False
    drop_activation: bool = False
    keras_masks: tuple[TensorState, ...] = ()
    ask: Callable[[Any, TensorState], LipschitzMap]

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of this name, `default` if it was not passed."""
        return self.arguments.get(name, default)

    @property
    def states(self) -> list[TensorState]:
        """All tensors among the arguments in order, without masks."""
        given = {name: value for name, value in self.arguments.items() if not is_mask(name)}
        # Flattening the dictionary itself would sort it by name.
        leaves = keras.tree.flatten(list(given.values()))
        return [leaf for leaf in leaves if isinstance(leaf, TensorState)]

    @property
    def perturbed(self) -> list[TensorState]:
        """All tensors among the arguments that change with the certified inputs."""
        return [state for state in self.states if not state.is_fixed]

    @property
    def state(self) -> TensorState:
        """The first tensor that changes with the certified inputs."""
        return self.perturbed[0]

    @property
    def rank(self) -> int:
        """Number of axes of the output."""
        return len(self.shape) + (self.fold > 0)

    @property
    def width(self) -> int | None:
        """Size of the last axis of the output: 1 without an axis, `None` if it is not known."""
        if not self.shape:
            return 1
        return None if self.dynamic[-1] else self.shape[-1]

    @property
    def training(self) -> bool:
        """Whether the layer is called in training mode."""
        return bool(self.argument("training"))

    def constant(self, value: Any) -> np.ndarray:
        """A constant of the model in float64, after the cast it undergoes at inference."""
        # Keras casts variables on use, but not arrays.
        variable = isinstance(value, keras.Variable) and value._autocast
        return cast_to_compute_dtype(value, self.compute_dtype if variable else None)

    def operand(self, value: Any) -> TensorState:
        """The state of a tensor of the call, or of a constant of the model."""
        if isinstance(value, TensorState):
            return value
        values = self.constant(value)
        width = self.shape[-1] if self.shape else None
        spread = values
        if width is not None and (values.ndim == 0 or values.shape[-1] == 1):
            # It is broadcast to all entries of a token.
            spread = np.broadcast_to(values, (*values.shape[:-1], width))
        nothing = Gain.none(self.norm)
        return TensorState(
            gain=nothing,
            published=nothing,
            shape=values.shape,
            dynamic=(False,) * values.ndim,
            fold=0,
            kind=Kind.FIXED,
            values=values,
            range=TokenRange.of_values(spread),
        )


def is_mask(name: str) -> bool:
    """Whether an argument of this name is a mask, by the naming convention of Keras."""
    return name == "mask" or name.endswith("_mask")
