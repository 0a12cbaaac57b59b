"""Callbacks that watch and penalise Lipschitz bounds during `fit`."""

from keras_lipattn.callbacks.lipschitz_monitor import LipschitzMonitor

__all__ = ["LipschitzMonitor"]
