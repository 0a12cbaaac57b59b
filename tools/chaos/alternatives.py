"""Backups by other means than `DurableBackup`, for comparison under the same kills."""

import pathlib
from typing import Any

import keras
import tensorflow as tf


class ManagedBackup(keras.callbacks.Callback):
    """A backup of all variables by `tf.train.CheckpointManager`, one checkpoint per epoch."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self._folder = folder

    def on_train_begin(self, logs=None):
        model: Any = self.model
        variables = [*model.variables, *model.optimizer.variables]
        checkpoint = tf.train.Checkpoint(variables=[variable.value for variable in variables])
        self._manager = tf.train.CheckpointManager(
            checkpoint, str(self._folder), max_to_keep=1, checkpoint_name="epoch"
        )
        latest = self._manager.latest_checkpoint
        if latest:
            checkpoint.restore(latest).assert_consumed()
            model._initial_epoch = int(latest.rsplit("-", 1)[1])

    def on_epoch_end(self, epoch, logs=None):
        self._manager.save(checkpoint_number=epoch + 1)


def orbax_backup(folder: pathlib.Path) -> keras.callbacks.Callback:
    """A backup by `keras.callbacks.OrbaxCheckpoint`, which needs `orbax-checkpoint` and JAX."""

    class OrbaxBackup(keras.callbacks.OrbaxCheckpoint):
        def on_train_begin(self, logs=None):
            super().on_train_begin(logs)
            model: Any = self.model
            latest = self.checkpointer.latest
            if latest is not None:
                # Keras does not recognize the folder of one epoch, but takes the newest by itself.
                model.load_weights(folder)
                model._initial_epoch = latest.step + 1

    # In the background it would still be writing when the next epoch begins.
    return OrbaxBackup(str(folder), save_on_background=False)
