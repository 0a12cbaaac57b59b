"""One call of a layer, as its rule sees it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.certify.weights import as_run

if TYPE_CHECKING:
    from keras_lipattn.certify.step import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a layer in the graph of a model.

    Args:
        norm: norm of the certificate: `"l2"`, `"token"` or `"linf"`.
        args: positional arguments, with a `TensorState` for every tensor of the graph.
        kwargs: keyword arguments, likewise; only those that the graph passes explicitly.
        shape: sizes of the axes of the first output without the batch axis; the largest ones
            where they vary, `None` where nothing is known.
        dynamic: for each of them whether it varies.
        output_dtype: dtype of the first output.
        compute_dtype: dtype in which constants of the graph take part.
        mask: mask class that `certify` was told to assume for attention layers, or `None`.
        assume_fixed_mask: whether masks that are computed from certified inputs count as fixed.
        drop_activation: whether the layer is asked about without its last softmax or sigmoid.
        ask: a function of a layer and the state of its input that returns the step of that layer.
        walk_into: a function of a layer and the state of its input that returns the state of its
            output, with rows of the certificate for what is inside. A rule may return that state.
    """

    norm: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    shape: tuple[int | None, ...]
    dynamic: tuple[bool, ...]
    output_dtype: str
    compute_dtype: str | None = None
    mask: Any = None
    assume_fixed_mask: bool = False
    drop_activation: bool = False
    ask: "Callable[[Any, TensorState], Step]"
    walk_into: Callable[[Any, TensorState], TensorState]

    @property
    def first(self) -> Any:
        """The first argument, however it was passed: Keras calls it by any name."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def states(self) -> list[TensorState]:
        """All tensors of the graph among the arguments, in order."""
        leaves = keras.tree.flatten((tuple(self.args), dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, TensorState)]

    @property
    def varying(self) -> list[TensorState]:
        """Those of them which move with the certified inputs."""
        return [state for state in self.states if not state.held]

    @property
    def state(self) -> TensorState:
        """The first tensor which moves with the certified inputs."""
        return self.varying[0]

    @property
    def training(self) -> bool:
        """Whether the graph calls the layer in training mode."""
        return self.kwargs.get("training") is True

    def constant(self, value: Any):
        """A constant of the graph in float64, after the cast it undergoes when it runs."""
        # Variables are cast to the layer's dtype on use, arrays are not.
        variable = isinstance(value, keras.Variable) and value._autocast
        return as_run(value, self.compute_dtype if variable else None)
