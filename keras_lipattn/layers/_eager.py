"""Whether a tensor has a value now, so that a failure can be raised instead of carried along."""

import keras


def has_value(tensor):
    """False while a graph is traced."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.is_symbolic_tensor(tensor)
    if backend == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        return not isinstance(tensor, jax.core.Tracer)
    return True
