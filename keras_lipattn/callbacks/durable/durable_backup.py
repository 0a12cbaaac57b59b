"""A callback that backs up a training, to be resumed after any interruption."""

import os
import pathlib
import shutil
import warnings
import zipfile
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn._whole_file import whole_file


class DurableBackup(keras.callbacks.Callback):
    """Backs up training after every epoch, and resumes it when the program is run again.

    `keras.callbacks.BackupAndRestore` overwrites its weights in place and then writes the number of
    the epoch. A program that is killed in between leaves broken weights, an empty file, or weights
    that are one epoch ahead of their number. This callback writes weights and epoch as one file,
    which replaces the old one atomically. A program killed at any moment leaves a whole backup.

    It restores, bit for bit: all weights, which include running vectors and penalty coefficients;
    the state of the optimizer; the state of random number generators in layers such as `Dropout`;
    and the number of completed epochs. It does not restore: the order of the data, unless that
    depends on the epoch alone; attributes of other callbacks (the patience of `EarlyStopping`, the
    best value of `ModelCheckpoint`); random number generators outside of the model.

    Put it last in `callbacks`: an epoch is complete once it is backed up, and by then the other
    callbacks have written their files. If a backup cannot be written, for example because the disk
    is full, there is a warning, the last backup stays, training continues, and the next epoch tries
    again.

    Args:
        backup_dir: Local folder for the backups of this training. It must hold nothing else.
        delete_checkpoint: Whether to remove the folder at the end of training. By default it stays.
            A program that is killed after training, for example during an export, then finds the
            trained weights when it is run again, and does not train further.

    Raises:
        ValueError: If `backup_dir` is empty. From `fit`: if the model is not built, or differs from
            the model in the backup.
        OSError: From `fit`, if the backup cannot be read.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), SpectralDense(3)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 4)), np.zeros((8, 3))
    >>> backup = DurableBackup("run/backup")
    >>> history = model.fit(x, y, epochs=2, callbacks=[LipschitzMonitor(), backup], verbose=0)
    >>> backup.completed
    2
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
        """Number of epochs in the newest backup, 0 if there is none."""
        return max(self._backups(), default=0)

    def on_train_begin(self, logs=None):
        model: Any = self.model
        if not model.built:
            raise ValueError(
                "A backup needs a model with weights. Build the model, or call it on data, before "
                f"`fit`. Received: model {model.name!r}, which is not built"
            )
        epochs = self.completed
        if epochs:
            self._restore(model, self._backups()[epochs])
            model._initial_epoch = epochs

    def on_epoch_begin(self, epoch, logs=None):
        self._reset_initial_epoch()

    def on_epoch_end(self, epoch, logs=None):
        folder = pathlib.Path(self.backup_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            newest = folder / f"epoch-{epoch + 1:05d}.npz"
            with whole_file(newest) as path:
                self._save(self.model, path)
            for old in self._backups().values():
                if old != newest:
                    old.unlink()
        except OSError as error:
            warnings.warn(
                f"Epoch {epoch + 1} could not be backed up. Training continues, and the backup of "
                f"{self.completed or 'no'} epochs stays. Received: {error}",
                stacklevel=2,
            )

    def on_train_end(self, logs=None):
        self._reset_initial_epoch()
        if self.delete_checkpoint:
            shutil.rmtree(self.backup_dir, ignore_errors=True)

    def _reset_initial_epoch(self) -> None:
        # Otherwise the next `fit` of this model would begin there too.
        model: Any = self.model
        model._initial_epoch = None

    def _backups(self) -> dict[int, pathlib.Path]:
        """Files by number of completed epochs."""
        paths = pathlib.Path(self.backup_dir).glob("epoch-*.npz")
        return {int(path.stem.removeprefix("epoch-")): path for path in paths}

    def _save(self, model: Any, path: pathlib.Path) -> None:
        # Not as `.weights.h5`: HDF5 fails with a segmentation fault when the disk is full.
        arrays = {name: ops.convert_to_numpy(value) for name, value in _state(model).items()}
        # Not by `np.savez`: numpy 2.0 leaves the archive open when the disk is full.
        with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def _restore(self, model: Any, path: pathlib.Path) -> None:
        state = _state(model)
        with np.load(path) as saved:
            if saved.files != list(state):
                differing = sorted(set(saved.files).symmetric_difference(state))
                raise ValueError(
                    "The model differs from the one in the backup, or was compiled differently: "
                    f"only one of the two has {differing[:3]}. Received: {path}"
                )
            for name, variable in state.items():
                # Files of NumPy do not store bfloat16 as a dtype.
                variable.assign(saved[name].view(ops.convert_to_numpy(variable).dtype))


def _state(model: Any) -> dict[str, Any]:
    """All variables that training changes, by names that are the same in every run."""
    variables = list(model.variables)
    if model.optimizer is not None:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables += model.optimizer.variables
    return {
        f"{index:05d} {variable.name} {'x'.join(map(str, variable.shape))}": variable
        for index, variable in enumerate(variables)
    }
