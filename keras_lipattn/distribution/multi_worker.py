"""`fit`, `evaluate` and `predict` on several workers."""

from typing import TypeVar

import keras

from keras_lipattn.distribution._changes import (
    build_from_local_batches,
    give_outputs_of_steps_an_axis,
)
from keras_lipattn.distribution._cluster import runs_on_workers

Model = TypeVar("Model", bound=keras.Model)


def multi_worker(model: Model) -> Model:
    """Lets a model train under `tf.distribute.MultiWorkerMirroredStrategy`.

    Keras 3.15 fails there, whatever the model, for two reasons. To build the model it averages a
    batch over the replicas, which TensorFlow refuses for batches on different machines; this uses
    the batch of this worker. And it averages the numbers that a step returns over an axis which
    scalars do not have; this gives them one. Nothing else changes: `fit`, `evaluate`, `predict`,
    callbacks and saved files are those of Keras.

    The model itself is changed, not its class: any model can be, Functional, Sequential,
    subclassed or loaded, and what is saved is the plain model.

    Args:
        model: A model created within the scope of its strategy.

    Returns:
        `model`. Under any other strategy, or none, it is left as it is, so that one program serves
        all.

    Example:

    ```python
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = multi_worker(keras.Model(inputs, outputs))
        model.compile("sgd", "mse")
    model.fit(dataset, epochs=10, callbacks=[LipschitzMonitor(penalty=0.1)])
    ```

    Reference:
        keras-team/keras#20585.
    """
    # `distribute_strategy` exists with TensorFlow only.
    strategy = getattr(model, "distribute_strategy", None)
    if not runs_on_workers(strategy):
        return model
    build_from_local_batches(model, strategy)
    give_outputs_of_steps_an_axis(model)
    return model
