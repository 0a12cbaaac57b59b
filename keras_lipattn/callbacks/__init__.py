"""Callbacks that log and penalize Lipschitz bounds in `fit`, and callbacks for interruptions."""

from keras_lipattn.callbacks.durable import DurableBackup, DurableCheckpoint, DurableCSVLogger
from keras_lipattn.callbacks.lipschitz_monitor import LipschitzMonitor

__all__ = ["DurableBackup", "DurableCSVLogger", "DurableCheckpoint", "LipschitzMonitor"]
