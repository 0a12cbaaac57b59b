"""The inputs that a `fit` is about to train on, before the first batch."""

import contextlib
import inspect
from typing import Any

import keras
from keras.src import backend

from keras_lipattn._seen_calls import remember_call, specs_of
from keras_lipattn.certification.keras_models import function_of


def meet_training_data(model: keras.Model) -> bool:
    """Calls a model without a graph symbolically on the inputs of the `fit` that is calling.

    This creates its weights as the first batch would, and the call is remembered.

    Args:
        model: The model in training.

    Returns:
        Whether the model was called. Not so if it has a graph, if the inputs cannot be told, or if
        the model does not take them: its `train_step` then calls it on something else, or the first
        batch raises the error.
    """
    if function_of(model) is not None:
        return False
    x = _input_specs(model)
    if x is None:
        return False
    strategy = getattr(model, "distribute_strategy", None)
    try:
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            # Keras builds models so where it does not leave it to the first batch.
            backend.compute_output_spec(model, x, training=False)
    except Exception:
        return False
    remember_call(model, x)
    return True


def _input_specs(model: keras.Model) -> Any:
    """`KerasTensor`s in the structure of the inputs; axes that vary between batches are `None`.

    `None` on other backends than TensorFlow, in a `fit` that was overridden, and for inputs that
    are sparse, ragged, or of unknown rank.
    """
    iterator = _epoch_iterator(model)
    element = getattr(getattr(iterator, "_distributed_dataset", None), "element_spec", None)
    if element is None:
        return None
    import tensorflow as tf

    # Each replica of a strategy gets inputs of the same kind.
    element = keras.tree.map_structure(
        lambda leaf: getattr(leaf, "_value_specs", [leaf])[0], element
    )
    x, _, _ = keras.utils.unpack_x_y_sample_weight(element)
    leaves = keras.tree.flatten(x)
    if not all(isinstance(leaf, tf.TensorSpec) and leaf.shape.rank for leaf in leaves):
        return None
    return specs_of(x)


def _epoch_iterator(model: keras.Model) -> Any:
    # Keras tells a callback nothing about the data: it is found among the callers.
    frame = inspect.currentframe()
    try:
        while frame is not None:
            if frame.f_locals.get("self") is model and "epoch_iterator" in frame.f_locals:
                return frame.f_locals["epoch_iterator"]
            frame = frame.f_back
    finally:
        del frame
    return None
