"""A backup in a folder that all workers read."""

from typing import Any

import keras

from keras_lipattn.distribution.is_chief import is_chief


class SharedBackup(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` for several workers: all restore, the chief alone saves.

    With that of Keras every worker writes the same files, or, given folders of their own, workers
    which were killed come back in different epochs and wait for each other for ever. Here the
    folder must be one that all workers see. No worker can be late: the chief saves at the end of an
    epoch, which takes all of them, and all have restored by then.

    Arguments are those of `keras.callbacks.BackupAndRestore`. Under a strategy of one process, or
    none, both do the same.
    """

    def on_train_batch_end(self, batch, logs=None):
        if self._is_chief:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._is_chief:
            super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        if self._is_chief:
            super().on_train_end(logs)

    @property
    def _is_chief(self) -> bool:
        model: Any = self.model
        # Keras knows this strategy with TensorFlow only.
        return is_chief(getattr(model, "distribute_strategy", None))
