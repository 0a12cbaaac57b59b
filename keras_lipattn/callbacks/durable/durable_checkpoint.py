"""A callback that saves models and replaces each file atomically."""

import io
from typing import Any

import keras

from keras_lipattn._whole_file import whole_file


class DurableCheckpoint(keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` that never leaves a half-written file.

    Keras writes a model in place: a program that is killed meanwhile leaves neither the old file
    nor the new one. Here the new file replaces the old one atomically. The arguments are those of
    `ModelCheckpoint`. Paths must be local. If a model cannot be written, for example because the
    disk is full, an `OSError` is raised, as in Keras, and the old file stays.

    Like `ModelCheckpoint`, it does not know the best value of an earlier run. After an interruption
    pass it as `initial_value_threshold`.

    Raises:
        OSError: From `fit`, if a file cannot be written.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), SpectralDense(3)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 4)), np.zeros((8, 3))
    >>> best = DurableCheckpoint("best.keras", "lipschitz_total", save_best_only=True, mode="min")
    >>> history = model.fit(x, y, epochs=2, callbacks=[LipschitzMonitor(), best], verbose=0)
    >>> keras.saving.load_model("best.keras").output_shape
    (None, 3)
    """

    @property
    def model(self) -> Any:
        return _SavedAtomically(super().model)


class _SavedAtomically:
    """A model with other methods for saving."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def save(self, filepath: str, **options: Any) -> None:
        with whole_file(filepath) as path:
            self._model.save(path, **options)

    def save_weights(self, filepath: str, **options: Any) -> None:
        content = _NamedBuffer(filepath)
        self._model.save_weights(content, **options)
        with whole_file(filepath) as path:
            path.write_bytes(content.getvalue())


class _NamedBuffer(io.BytesIO):
    """A file in memory, since HDF5 fails with a segmentation fault when the disk is full."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        # Keras checks the suffix.
        return self._name
