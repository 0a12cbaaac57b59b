"""A callback that saves models, each as a whole or not at all."""

import io
from typing import Any

import keras

from keras_lipattn._whole_file import whole_file


class DurableCheckpoint(keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` whose files are never half-written.

    Keras writes a model in place: a program killed meanwhile leaves neither the old file nor the
    new one. Here the new one takes the place of the old one in one step. The arguments are those
    of `ModelCheckpoint`; paths must be local. A model that cannot be written, as on a full disk,
    is an `OSError`, as with Keras; the old file stays.

    Like that of Keras, it knows nothing of the best value of an earlier run: after an interruption
    give it as `initial_value_threshold`.

    Raises:
        OSError: From `fit`, if a file cannot be written.

    Example:

    ```python
    best = DurableCheckpoint("run/best.keras", "lipschitz_total", save_best_only=True, mode="min")
    model.fit(x, y, epochs=10, callbacks=[LipschitzMonitor(), best])
    ```
    """

    @property
    def model(self) -> Any:
        return _SavedWhole(super().model)


class _SavedWhole:
    """A model, apart from how it is saved."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def save(self, filepath: str, **options: Any) -> None:
        with whole_file(filepath) as path:
            self._model.save(path, **options)

    def save_weights(self, filepath: str, **options: Any) -> None:
        content = _Named(filepath)
        self._model.save_weights(content, **options)
        with whole_file(filepath) as path:
            path.write_bytes(content.getvalue())


class _Named(io.BytesIO):
    """A file in memory: HDF5 dies of a segmentation fault when it writes to a full disk."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        # Keras looks for the ending.
        return self._name
