"""A callback from whose backups training goes on after any interruption."""

import os
import pathlib
import re
import shutil
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn._whole_file import remove_partial, whole_file

_NAME = re.compile(r"epoch-(\d+)\.npz")


class DurableBackup(keras.callbacks.Callback):
    """Backs training up after every epoch, and goes on from the backup in a program run again.

    `keras.callbacks.BackupAndRestore` overwrites its weights in place and the number of its epoch
    after them: a program killed in between finds broken weights, an empty file, or weights which
    are one epoch ahead of their number. Here weights and epoch are one file, which takes its place
    in one step, so that a program killed at any moment finds the newest whole backup.

    What is restored, bit for bit: all weights, hence running vectors and penalty coefficients too,
    the state of the optimizer, that of the random numbers of layers such as `Dropout`, and the
    number of epochs done. What is not: the order of the data, unless it depends on the epoch
    alone; what other callbacks keep in attributes (the patience of `EarlyStopping`, the best value
    of `ModelCheckpoint`); random numbers outside the model.

    Put it last in `callbacks`, so that what the others write for an epoch is written before the
    epoch counts as done. A backup that cannot be written, as on a full disk, is a warning: the last
    one stays, training goes on, and the next epoch tries again.

    Args:
        backup_dir: Local folder of the backups of this one training, and of nothing else.
        delete_checkpoint: Whether to remove the folder at the end of training. By default it stays:
            a program which is killed after training, as during an export, then has trained
            weights when it is run again, and trains for no more epochs.

    Raises:
        ValueError: If `backup_dir` is empty. From `fit`: if the model is not built, or differs from
            the one in the backup.
        OSError: From `fit`, if the backup cannot be read.

    Example:

    ```python
    monitor = LipschitzMonitor(penalty=0.1)
    history = DurableCSVLogger("run/history.csv")
    model.fit(x, y, epochs=10, callbacks=[monitor, history, DurableBackup("run/backup")])
    ```
    """

    def __init__(self, backup_dir: str | os.PathLike, delete_checkpoint: bool = False) -> None:
        if not os.fspath(backup_dir):
            raise ValueError(
                f"`backup_dir` must name a folder. Received: backup_dir={backup_dir!r}"
            )
        super().__init__()
        self.backup_dir = backup_dir
        self.delete_checkpoint = delete_checkpoint

    @property
    def completed(self) -> int:
        """Number of epochs in the newest backup, 0 when there is none."""
        return max(self._backups(), default=0)

    def on_train_begin(self, logs=None):
        model: Any = self.model
        if not model.built:
            raise ValueError(
                "A backup is of weights: build the model, or call it on data, before `fit`. "
                f"Received: model {model.name!r}, which is not built"
            )
        epochs = self.completed
        if epochs:
            self._restore(model, self._backups()[epochs])
            model._initial_epoch = epochs

    def on_epoch_begin(self, epoch, logs=None):
        self._forget_initial_epoch()

    def on_epoch_end(self, epoch, logs=None):
        folder = pathlib.Path(self.backup_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial(folder)
            newest = folder / f"epoch-{epoch + 1:05d}.npz"
            with whole_file(newest) as path:
                self._save(self.model, path)
            for old in self._backups().values():
                if old != newest:
                    old.unlink()
        except OSError as error:
            warnings.warn(
                f"There is no backup of epoch {epoch + 1}; training goes on, and the backup of "
                f"{self.completed or 'no'} epochs stays. Received: {error}",
                stacklevel=2,
            )

    def on_train_end(self, logs=None):
        self._forget_initial_epoch()
        if self.delete_checkpoint:
            shutil.rmtree(self.backup_dir, ignore_errors=True)

    def _forget_initial_epoch(self) -> None:
        # Else the next `fit` of this model, whatever its callbacks, would begin there.
        model: Any = self.model
        model._initial_epoch = None

    def _backups(self) -> dict[int, pathlib.Path]:
        matches = {path: _NAME.fullmatch(path.name) for path in _entries(self.backup_dir)}
        return {int(match[1]): path for path, match in matches.items() if match}

    def _save(self, model: Any, path: pathlib.Path) -> None:
        # Not as `.weights.h5`: HDF5 dies of a segmentation fault when the disk is full.
        arrays = {name: ops.convert_to_numpy(value) for name, value in _state(model).items()}
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _restore(self, model: Any, path: pathlib.Path) -> None:
        state = _state(model)
        with np.load(path) as saved:
            if saved.files != list(state):
                differing = sorted(set(saved.files).symmetric_difference(state))
                raise ValueError(
                    "The model differs from the one in the backup, or was compiled differently: "
                    f"only one of them has {differing[:3]}. Received: {path}"
                )
            for name, variable in state.items():
                # NumPy forgets the type of bfloat16.
                variable.assign(saved[name].view(ops.convert_to_numpy(variable).dtype))


def _state(model: Any) -> dict[str, Any]:
    """All variables that training changes, under names which are the same in every run."""
    variables = list(model.variables)
    if model.optimizer is not None:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables += model.optimizer.variables
    return {
        f"{index:05d} {variable.name} {'x'.join(map(str, variable.shape))}": variable
        for index, variable in enumerate(variables)
    }


def _entries(folder: str | os.PathLike) -> list[pathlib.Path]:
    return sorted(pathlib.Path(folder).glob("epoch-*"))
