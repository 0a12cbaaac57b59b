"""The other callbacks of the same `fit`."""

import inspect
import warnings
from typing import Any

import keras

from keras_lipattn.callbacks.durable_backup import DurableBackup

# Callbacks which do something at the end of an epoch, but do not read the logs.
_INDIFFERENT = (
    DurableBackup,
    keras.callbacks.BackupAndRestore,
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.SwapEMAWeights,
)


def callbacks_beside(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """All callbacks of the `fit` that is calling `callback`, in order; empty if nobody can tell."""
    # Keras tells a callback nothing about the others: the list is found among the callers.
    frame = inspect.currentframe()
    try:
        while frame is not None:
            owner: Any = frame.f_locals.get("self")
            listed = isinstance(owner, keras.callbacks.CallbackList)
            if listed and any(other is callback for other in owner.callbacks):
                return list(owner.callbacks)
            frame = frame.f_back
    finally:
        del frame
    return []


def warn_of_earlier_readers(
    callback: keras.callbacks.Callback, beside: list[keras.callbacks.Callback]
) -> None:
    """Warns when callbacks that would read the logs run before `callback` writes to them."""
    earlier = []
    for other in beside:
        if other is callback:
            break
        reads = not getattr(other.on_epoch_end, "_is_default", False)
        if reads and not isinstance(other, (*_INDIFFERENT, type(callback))):
            earlier.append(type(other).__name__)
    if earlier:
        warnings.warn(
            f"{type(callback).__name__} must come first in `callbacks`: what it writes to the logs "
            "is not seen by callbacks before it. "
            f"Received before it: {', '.join(earlier)}",
            stacklevel=2,
        )
