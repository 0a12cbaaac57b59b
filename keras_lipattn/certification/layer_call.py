"""One call of a layer, as its rule sees it."""

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
        arguments: every argument that is not left out, by its name in the signature of `call`, with
            a `TensorState` for every tensor. Masks and `training` are there as Keras fills them in.
        shape: sizes of the axes of the first output after the first axis; the largest ones where
            they vary, `None` where nothing is known.
        dynamic: for each of them whether it varies.
        fold: entries of the first axis of the output per example, see `TensorState`.
        output_dtype: dtype of the first output.
        compute_dtype: dtype to which variables are cast.
        mask: mask class that `certify` was told to assume for attention layers, or `None`.
        assume_fixed_mask: whether masks that are computed from certified inputs count as fixed.
        drop_activation: whether the layer is asked about without its last softmax or sigmoid.
        keras_masks: the masks that come with tensors among the arguments, which `call` may look at.
        ask: a function of a layer and the state of its input that returns the map of that layer.
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
        """The argument of this name, `default` where it is left out."""
        return self.arguments.get(name, default)

    @property
    def states(self) -> list[TensorState]:
        """All tensors among the arguments in order, masks left out."""
        given = {name: value for name, value in self.arguments.items() if not is_mask(name)}
        # Not sorted by name, as a dictionary would be.
        leaves = keras.tree.flatten(list(given.values()))
        return [leaf for leaf in leaves if isinstance(leaf, TensorState)]

    @property
    def perturbed(self) -> list[TensorState]:
        """Those of them which change with the certified inputs."""
        return [state for state in self.states if not state.is_fixed]

    @property
    def state(self) -> TensorState:
        """The first tensor which changes with the certified inputs."""
        return self.perturbed[0]

    @property
    def rank(self) -> int:
        """Number of axes of the output."""
        return len(self.shape) + (self.fold > 0)

    @property
    def width(self) -> int | None:
        """Size of the last axis of the output, 1 without any, `None` when it is not known."""
        if not self.shape:
            return 1
        return None if self.dynamic[-1] else self.shape[-1]

    @property
    def training(self) -> bool:
        """Whether the layer is called in training mode."""
        return bool(self.argument("training"))

    def constant(self, value: Any) -> np.ndarray:
        """A constant of the model in float64, after the cast it undergoes at inference."""
        # Variables are cast to the layer's dtype on use, arrays are not.
        variable = isinstance(value, keras.Variable) and value._autocast
        return cast_to_compute_dtype(value, self.compute_dtype if variable else None)

    def operand(self, value: Any) -> TensorState:
        """A tensor of the call, or a constant of the model as a state that does not change."""
        if isinstance(value, TensorState):
            return value
        values = self.constant(value)
        width = self.shape[-1] if self.shape else None
        spread = values
        if width is not None and (values.ndim == 0 or values.shape[-1] == 1):
            # A number for all entries of a token: its range is that of the tokens it makes.
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
    """Whether an argument of this name is a mask, by the convention of Keras."""
    return name == "mask" or name.endswith("_mask")
