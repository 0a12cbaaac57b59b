"""Detection of the exports of Keras that turn variables into constants."""

import traceback

import keras

# Modules of Keras that trace a model and then freeze its variables. There is no public sign of it.
_FREEZING = ("keras.src.export.onnx", "keras.src.export.litert", "keras.src.export.openvino")


def freezes_variables():
    """Whether this call is traced by `model.export` for a format that holds no variables."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    frames = traceback.walk_stack(None)
    return any(frame.f_globals.get("__name__") in _FREEZING for frame, _ in frames)
