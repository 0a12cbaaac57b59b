"""Calling a layer without a trace in its losses."""

import contextlib
from typing import Any

import keras


@contextlib.contextmanager
def losses_kept(function: Any):
    """Puts back the losses of the last call, which Keras clears at the next one."""
    layers = function._flatten_layers() if isinstance(function, keras.layers.Layer) else []
    losses = [(inner, list(inner._losses), set(inner._loss_ids)) for inner in layers]
    try:
        yield
    finally:
        for inner, values, ids in losses:
            inner._losses[:] = values
            inner._loss_ids.clear()
            inner._loss_ids.update(ids)
