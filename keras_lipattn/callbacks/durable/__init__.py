"""Callbacks whose files survive interruptions of a training."""

from keras_lipattn.callbacks.durable.durable_backup import DurableBackup
from keras_lipattn.callbacks.durable.durable_checkpoint import DurableCheckpoint
from keras_lipattn.callbacks.durable.durable_csv_logger import DurableCSVLogger

__all__ = ["DurableBackup", "DurableCSVLogger", "DurableCheckpoint"]
