"""The penalty: its coefficient and targets, and the training step that includes it."""

import contextlib
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src import backend

from keras_lipattn._seen_calls import remember_call, specs_of
from keras_lipattn.callbacks._layer_bounds import WatchedLayer
from keras_lipattn.certification.keras_models import function_of
from keras_lipattn.layers.lipschitz_layer import LipschitzLayer, Tracking

Penalty = float | Callable[[int], Any] | Callable[[int, float], Any] | None
Target = float | dict[str, float]

_TWO_TRACKING = (
    "Only one monitor of a `fit` may have `penalty` or `running_freq`, since a layer has one "
    "running bound. Received: two of them"
)


# Coefficient --------------------------------------------------------------------------------------


def check_penalty(penalty: Penalty) -> None:
    """Raises unless `penalty` is `None`, a number that can be a coefficient, or callable."""
    if penalty is None or callable(penalty):
        return
    _require_coefficient(penalty, "`penalty` must be `None`, a number of at least 0, or a callable")


def coefficient_at(penalty: Penalty, epoch: int, current: float) -> float:
    """Coefficient of an epoch.

    Args:
        penalty: A number, `None` for 0, or a callable of the epoch, or of the epoch and the
            current coefficient.
        epoch: Index of the epoch, from 0.
        current: The coefficient now in the weights of the model.

    Returns:
        A float, at least 0.

    Raises:
        ValueError: If the callable returns anything else.
    """
    if not callable(penalty):
        return float(penalty or 0.0)
    schedule: Callable = penalty
    arguments = (epoch, current) if _takes_two(schedule) else (epoch,)
    value = np.asarray(ops.convert_to_numpy(schedule(*arguments)))
    message = f"The schedule `penalty` must return a number of at least 0 for epoch {epoch}"
    return _require_coefficient(value.item() if value.ndim == 0 else value, message)


def _takes_two(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        # Some functions written in C have no signature.
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in kinds and p.default is p.empty]
    return len(required) == 2


def _require_coefficient(value: Any, message: str) -> float:
    if not (_is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{message}. Received: {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Targets ------------------------------------------------------------------------------------------


def check_target(target: Target) -> None:
    """Raises unless `target` is a positive number, or a dictionary from names to such numbers."""
    targets = target if isinstance(target, dict) else {"": target}
    for name, value in targets.items():
        if not (_is_number(value) and math.isfinite(value) and value > 0):
            of_layer = f" of layer {name!r}" if name else ""
            raise ValueError(
                "`target` must be a positive number, or a dictionary from names or paths of layers "
                f"to positive numbers. Received: target={value!r}{of_layer}"
            )


def targets_of(target: Target, watched: Sequence[WatchedLayer]) -> dict[str, float]:
    """Targets by layer key. Layers that a dictionary does not name have none."""
    if not isinstance(target, dict):
        return {layer.key: float(target) for layer in watched}
    known = {name for layer in watched for name in (layer.layer.name, *layer.paths)}
    unknown = [name for name in target if name not in known]
    if unknown:
        raise ValueError(
            f"`target` names layers that are not watched in this model: {unknown}. The watched "
            f"layers are {[layer.path for layer in watched]}. Received: target={target}"
        )
    targets = {}
    for layer in watched:
        # A path is more specific than a name, which several layers may share.
        for name in (*layer.paths, layer.layer.name):
            if name in target:
                targets[layer.key] = float(target[name])
                break
    return targets


# Training step ------------------------------------------------------------------------------------


class MonitoredStep:
    """Replaces the train function of a model during one monitored `fit`.

    It does two things that callbacks cannot do:

    - It sees the first batch before the model does. A new subclassed model gets its weights here.
    - It switches the tracking of layers on while the step is traced and run. Layers then add their
      penalties. A `fit` that ends in an exception or an interrupt does not notify callbacks, and
      the next `fit` would reuse the traced function, penalty included. So a monitor announces
      every step. A step that was not announced is not part of this `fit`: it gets a new function.

    All monitors of one `fit` share one step.

    Args:
        model: The model in training.
    """

    def __init__(self, model: keras.Model) -> None:
        # The train function of Keras has no type.
        self._model: Any = model
        self._first: list[Callable[[bool], None]] = []
        self._tracking: Sequence[tuple[LipschitzLayer, Tracking]] | None = None
        self._announced = False
        # Each `fit` gives the model a new history.
        self._history = getattr(model, "history", None)
        # An interrupted `fit` may have left its step in the model.
        self._model.make_train_function(force=isinstance(model.train_function, MonitoredStep))
        self._function = self._replace()

    @classmethod
    def of(cls, model: Any) -> "MonitoredStep":
        """The step of the current `fit`, which another monitor may have made."""
        step = model.train_function
        history = getattr(model, "history", None)
        if isinstance(step, cls) and history is not None and step._history is history:
            return step
        return cls(model)

    def before_first(self, function: Callable[[bool], None]) -> None:
        """Registers a function to call before the first batch.

        Its argument says whether the model was called symbolically on its inputs.
        """
        self._first.append(function)

    def track(self, tracking: Sequence[tuple[LipschitzLayer, Tracking]]) -> None:
        """Switches tracking on in all steps from the next one on.

        Args:
            tracking: Pairs of a layer and its `Tracking`.

        Raises:
            ValueError: If another monitor of the same `fit` has done so.
        """
        if self._tracking is not None:
            raise ValueError(_TWO_TRACKING)
        self._tracking = tracking
        # A function that was traced before does not include the tracking.
        self._model.make_train_function(force=True)
        self._function = self._replace()

    def tracks(self, layer: LipschitzLayer) -> bool:
        """Whether the step computes the running bound of `layer`."""
        return any(layer is tracked for tracked, _ in self._tracking or ())

    def announce(self) -> None:
        """Announces that the next call is a step of the monitored `fit`."""
        if not self._first and self._tracking is None:
            return
        if self._model.train_function is not self:
            # A callback made a new train function, for example after freezing layers.
            self._function = self._replace()
        self._announced = True

    def remove(self) -> None:
        """Gives the model back a train function without tracking."""
        self._announced = False
        if self._model.train_function is self:
            self._model.train_function = self._function if self._tracking is None else None

    def __call__(self, *args: Any) -> Any:
        announced = self._announced and getattr(self._model, "history", None) is self._history
        self._announced = False
        if not announced:
            self.remove()
            self._model.make_train_function()
            return self._model.train_function(*args)
        if self._first:
            functions, self._first = self._first, []
            called = _call_on_inputs(self._model, args[-1])
            for function in functions:
                function(called)
            if self._tracking is None:
                self.remove()
                return self._function(*args)
        tracking = self._tracking or ()
        for layer, of_layer in tracking:
            layer.tracking = of_layer
        try:
            return self._function(*args)
        finally:
            for layer, _ in tracking:
                layer.tracking = None

    def _replace(self) -> Callable:
        """Takes the place of the train function of the model and returns that function."""
        function = self._model.train_function
        if isinstance(function, MonitoredStep):
            raise ValueError(_TWO_TRACKING)
        self._model.train_function = self
        return function


def sees_inputs_first(model: keras.Model) -> bool:
    """Whether `model` has no graph, so that its inputs are known only from the first batch.

    With other backends than TensorFlow, `fit` builds the model before it calls any callback.
    """
    return keras.backend.backend() == "tensorflow" and function_of(model) is None


def _call_on_inputs(model: keras.Model, iterator: Any) -> bool:
    """Calls a model symbolically on the inputs that an iterator over batches will give.

    This creates the weights as the first batch would. The call is remembered for certificates.

    Args:
        model: The model in training.
        iterator: The argument of its train function.

    Returns:
        Whether the call succeeded. If not, `train_step` calls the model on something else than its
        inputs, or the first batch raises the error.
    """
    x = _input_specs(iterator)
    if x is None:
        return False
    strategy = getattr(model, "distribute_strategy", None)
    try:
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            # `fit` of other backends builds models in the same way.
            backend.compute_output_spec(model, x, training=False)
    except Exception:
        return False
    remember_call(model, x)
    return True


def _input_specs(iterator: Any) -> Any:
    """`KerasTensor`s in the structure of the inputs; axes that vary between batches are `None`.

    `None` in a `fit` that was overridden, and for inputs that are sparse, ragged, or of unknown
    rank.
    """
    element = getattr(iterator, "element_spec", None)
    if element is None:
        return None
    import tensorflow as tf

    # Each replica of a strategy gets inputs of the same kind.
    element = keras.tree.map_structure(
        lambda leaf: getattr(leaf, "_value_specs", [leaf])[0], element
    )
    x, _, _ = keras.utils.unpack_x_y_sample_weight(element)
    leaves = keras.tree.flatten(x)
    if not all(isinstance(leaf, tf.TensorSpec) and leaf.shape.rank for leaf in leaves):
        return None
    return specs_of(x)
