"""Callbacks that watch and penalize Lipschitz bounds during `fit`, and survive interruptions."""

from keras_lipattn.callbacks.durable_backup import DurableBackup
from keras_lipattn.callbacks.durable_checkpoint import DurableCheckpoint
from keras_lipattn.callbacks.durable_csv_logger import DurableCSVLogger
from keras_lipattn.callbacks.lipschitz_monitor import LipschitzMonitor

__all__ = ["DurableBackup", "DurableCSVLogger", "DurableCheckpoint", "LipschitzMonitor"]
