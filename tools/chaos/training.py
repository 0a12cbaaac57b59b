"""A training on handwritten digits that may be killed and run again at any moment.

When it is run again in the same folder, it resumes. It writes which epochs it starts, and its
phase. At the end `final.npz` contains every variable of the model and the optimizer.
"""

import os
import pathlib
from typing import Any

import keras
import numpy as np
from sklearn import datasets

import keras_lipattn as kl
from keras_lipattn._whole_file import whole_file
from tools.chaos.alternatives import ManagedBackup, orbax_backup
from tools.chaos.phase import Phase

_BATCH = 64
_IMAGES = 1024


class Digits(keras.utils.PyDataset):
    """Batches whose order depends on the epoch alone."""

    def __init__(self, x, y):
        super().__init__()
        self.epoch = 0
        self._x, self._y = x, y

    def __len__(self):
        return len(self._x) // _BATCH

    def __getitem__(self, index):
        order = np.random.default_rng(self.epoch).permutation(len(self._x))
        chosen = order[index * _BATCH : (index + 1) * _BATCH]
        return self._x[chosen], self._y[chosen]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images as 8 tokens of 8 pixels in [0, 1], and their classes."""
    bunch: Any = datasets.load_digits()
    return (bunch.images / 16.0).astype("float32"), bunch.target


def classifier() -> keras.Model:
    """A small model with capped and penalized layers, and dropout."""
    inputs = keras.Input((8, 8))
    x = kl.SpectralDense(16, name="embed")(inputs)
    y = kl.L2MultiHeadAttention(2, 8, spectral_norm=2.0, name="attention")(x)
    x = kl.Residual(0.3, name="sum")([x, y])
    x = keras.layers.Dropout(0.1, name="dropout")(keras.layers.Flatten()(x))
    return keras.Model(inputs, kl.SpectralDense(10, spectral_norm=None, name="logits")(x))


def everything(model: Any) -> dict[str, Any]:
    """Every variable of a model and its optimizer."""
    variables = [*model.variables, *model.optimizer.variables]
    return {
        f"{index:03d} {variable.path}": keras.ops.convert_to_numpy(variable)
        for index, variable in enumerate(variables)
    }


def run(folder: pathlib.Path, epochs: int, whose: str) -> None:
    """Trains, starting from the last backup if there is one.

    Args:
        folder: Folder of all files.
        epochs: Number of epochs.
        whose: Which callbacks write, as in `attack`.
    """
    phase = Phase(folder)
    phase.tell("building")
    keras.utils.set_random_seed(0)
    x, y = digits()
    data = Digits(x[:_IMAGES], y[:_IMAGES])
    model: Any = classifier()
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    # Otherwise the first step is traced twice.
    model.optimizer.build(model.trainable_variables)
    history, checkpoint, backup = _writers(folder, whose)

    def telling(doing):
        return keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: phase.tell(f"{doing} epoch {epoch + 1}")
        )

    phase.tell("tracing and restoring")
    model.fit(
        data,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            _Begin(phase, data),
            kl.LipschitzMonitor(
                # Depends on the coefficient in the backup, so that a lost one would show.
                penalty=lambda epoch, coefficient: 1.5 * coefficient + 0.01,
                target=0.5,
            ),
            telling("writing history of"),
            history,
            telling("writing checkpoint of"),
            checkpoint,
            telling("writing backup of"),
            backup,
        ],
    )
    phase.tell("finishing")
    with whole_file(folder / "final.npz") as path:
        np.savez(path, **everything(model))


class _Begin(keras.callbacks.Callback):
    """Writes the epochs that start, and passes them to the data."""

    def __init__(self, phase, data):
        super().__init__()
        self._phase, self._data = phase, data

    def on_epoch_begin(self, epoch, logs=None):
        self._data.epoch = epoch
        self._phase.record(epoch)
        self._phase.tell(f"training epoch {epoch + 1}")

    def on_train_batch_end(self, batch, logs=None):
        if batch == len(self._data) - 1:
            self._phase.tell(f"certifying epoch {self._data.epoch + 1}")


def _writers(folder: pathlib.Path, whose: str) -> tuple[Any, Any, Any]:
    history, best, backup = (
        os.fspath(folder / name) for name in ("history.csv", "model.keras", "backup")
    )
    if whose == "keras":
        return (
            keras.callbacks.CSVLogger(history, append=True),
            keras.callbacks.ModelCheckpoint(best),
            keras.callbacks.BackupAndRestore(backup, delete_checkpoint=False),
        )
    backups = {"durable": kl.DurableBackup, "managed": ManagedBackup, "orbax": orbax_backup}
    return (
        kl.DurableCSVLogger(history),
        kl.DurableCheckpoint(best),
        backups[whose](folder / "backup"),
    )
