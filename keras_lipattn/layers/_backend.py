"""Questions to the backend that Keras does not answer."""

import traceback
from collections.abc import Iterable
from typing import Any

import keras

# Modules of Keras that trace a model and then freeze its variables. There is no public sign of it.
_FREEZING = ("keras.src.export.onnx", "keras.src.export.litert", "keras.src.export.openvino")


def has_value(tensor):
    """Whether a tensor has a value now; false while a graph is traced."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.is_symbolic_tensor(tensor)
    if backend == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        return not isinstance(tensor, jax.core.Tracer)
    return True


def variables_have_values():
    """Whether the host can read the variables that are created now."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    return tf.executing_eagerly()


def freezes_variables():
    """Whether this call is traced by `model.export` for a format that holds no variables."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    frames = traceback.walk_stack(None)
    return any(frame.f_globals.get("__name__") in _FREEZING for frame, _ in frames)


def require_created_in_scope(strategy: Any, variables: Iterable[keras.Variable], owner: str):
    """Raises unless all of `variables` were created under `strategy`.

    TensorFlow would fail later, with an assertion that does not name the cause.

    Args:
        strategy: A `tf.distribute.Strategy`; `None` for the current one.
        variables: Variables of Keras.
        owner: Name of their owner, for the error.

    Raises:
        ValueError: If a variable was created outside of the scope of `strategy`.
    """
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    strategy = strategy or tf.distribute.get_strategy()
    # The default strategy is no instance of this class, and takes any variable.
    if not isinstance(strategy, tf.distribute.Strategy):
        return
    for variable in variables:
        value: Any = variable.value
        # A stateless scope may have put a tensor in its place.
        if not isinstance(value, tf.Variable):
            continue
        if not strategy.extended.variable_created_in_scope(value):
            raise ValueError(
                f"{owner} has variables that were created outside of the strategy it runs under: "
                f"build the model within `strategy.scope()`. Received: variable {variable.path!r} "
                f"under {type(strategy).__name__}"
            )
