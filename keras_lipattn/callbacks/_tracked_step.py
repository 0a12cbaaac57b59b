"""The training step of one `fit`, with the tracking of layers switched on."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_lipattn.layers.lipschitz_layer import LipschitzLayer, Tracking


class TrackedStep:
    """Stands in for a model's train function: runs it with tracking on, for one `fit` only.

    Layers add penalties to the function that is traced while their `tracking` is set. A `fit` which
    ends in an exception or an interrupt tells no callback, and the function it traced would serve
    the next `fit`, penalty included. So tracking is on during the calls of the function alone, and
    every call must be announced by the monitor: a step which is not belongs to somebody else, gives
    the model a fresh function, and runs that.

    Args:
        model: The model in training.
        tracking: Pairs of a layer and its `Tracking`.
    """

    def __init__(
        self, model: keras.Model, tracking: Sequence[tuple[LipschitzLayer, Tracking]]
    ) -> None:
        # Keras does not say what its train function may be.
        self._model: Any = model
        self._tracking = tracking
        self._announced = False
        # Each `fit` gives the model a history of its own.
        self._history = getattr(model, "history", None)
        # A function traced before knows nothing of the tracking.
        model.make_train_function(force=True)
        self._function = self._take()

    def tracks(self, layer: LipschitzLayer) -> bool:
        """Whether the step computes the running bound of `layer`."""
        return any(layer is tracked for tracked, _ in self._tracking)

    def announce(self) -> None:
        """Tells that the next call is a step of the monitored `fit`."""
        if self._model.train_function is not self:
            # Somebody asked the model for a new function, as after freezing layers.
            self._function = self._take()
        self._announced = True

    def remove(self) -> None:
        """Gives the model back, its next function to be traced without tracking."""
        self._announced = False
        if self._model.train_function is self:
            self._model.train_function = None

    def _take(self) -> Callable:
        """The train function of the model, whose place this object takes."""
        function = self._model.train_function
        self._model.train_function = self
        return function

    def __call__(self, *args: Any) -> Any:
        ours = self._announced and getattr(self._model, "history", None) is self._history
        self._announced = False
        if not ours:
            self.remove()
            self._model.make_train_function()
            return self._model.train_function(*args)
        for layer, tracking in self._tracking:
            layer.tracking = tracking
        try:
            return self._function(*args)
        finally:
            for layer, _ in self._tracking:
                layer.tracking = None
