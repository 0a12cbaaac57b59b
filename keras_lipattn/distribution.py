"""Training on several machines with `tf.distribute.MultiWorkerMirroredStrategy`.

Keras 3.15 cannot do this alone.
"""

from typing import Any, TypeVar

import keras

__all__ = ["SharedBackup", "is_chief", "multi_worker"]

Model = TypeVar("Model", bound=keras.Model)


def multi_worker(model: Model) -> Model:
    """Lets a model train under `tf.distribute.MultiWorkerMirroredStrategy`.

    Keras 3.15 fails there with any model, for two reasons. To build the model it averages a batch
    over the replicas, which TensorFlow rejects for batches on different machines. With this
    function the model is built from the batch of its own worker. And Keras averages the scalars
    that a step returns over an axis, which scalars do not have. This function gives them one.
    Nothing else changes: `fit`, `evaluate`, `predict`, callbacks and saved files are those of
    Keras.

    The model is changed, not its class. It may be Functional, Sequential, subclassed or loaded, and
    a plain model is saved.

    Args:
        model: A model created within the scope of its strategy.

    Returns:
        `model`. It is not changed under any other strategy or without one, so one program works for
        all strategies.

    Example:

    ```python
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = multi_worker(keras.Model(inputs, outputs))
        model.compile("sgd", "mse")
    model.fit(dataset, epochs=10, callbacks=[LipschitzMonitor(penalty=0.1)])
    ```

    In a single process it changes nothing:

    >>> from keras_lipattn.distribution import multi_worker
    >>> model = keras.Sequential([keras.Input((4,)), keras_lipattn.SpectralDense(3)])
    >>> multi_worker(model) is model
    True

    Reference:
        keras-team/keras#20585.
    """
    # Only TensorFlow models have this attribute.
    strategy = getattr(model, "distribute_strategy", None)
    if _has_workers(strategy):
        _build_from_local_batches(model, strategy)
        _add_axis_to_step_outputs(model)
    return model


def is_chief(strategy: Any) -> bool:
    """Whether this process writes files: it is the chief of several workers, or the only process.

    Code that runs on the chief only must not need the other workers. It may read weights, save,
    certify and export. It must not call `fit`, `evaluate` or `predict`, or create variables under
    the strategy: the other workers would not take part, and all workers would fail. So call
    `export_saved_model` outside of `strategy.scope()`.

    Args:
        strategy: A `tf.distribute.Strategy`, such as `model.distribute_strategy`, or `None`.

    Returns:
        A Boolean. `True` if one process drives all replicas.

    Example:

    ```python
    callbacks = [LipschitzMonitor(), SharedBackup("backup")]
    if is_chief(strategy):
        callbacks.append(keras.callbacks.CSVLogger("history.csv"))
    model.fit(dataset, epochs=10, callbacks=callbacks)
    if is_chief(strategy):
        export_saved_model(model, "export")
    ```

    >>> from keras_lipattn.distribution import is_chief
    >>> is_chief(None)
    True
    """
    if not _has_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_type == "worker" and resolver.task_id == 0


class SharedBackup(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` for several workers: all restore, only the chief saves.

    With `BackupAndRestore` either every worker writes the same files or, with one folder per
    worker, workers that were killed may resume in different epochs and wait for each other forever.
    Here all workers must see the same folder. They always restore the same epoch: the chief saves
    at the end of an epoch, which all workers take part in after they have restored.

    The arguments are those of `keras.callbacks.BackupAndRestore`. With one process, both callbacks
    do the same.

    Example:

    >>> from keras_lipattn.distribution import SharedBackup
    >>> model = keras.Sequential([keras.Input((4,)), keras_lipattn.SpectralDense(3)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 4)), np.zeros((8, 3))
    >>> history = model.fit(x, y, epochs=2, callbacks=[SharedBackup("backup")], verbose=0)
    >>> len(history.history["loss"])
    2
    """

    def on_train_batch_end(self, batch, logs=None):
        if self._is_chief:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._is_chief:
            super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        if self._is_chief:
            super().on_train_end(logs)

    @property
    def _is_chief(self) -> bool:
        model: Any = self.model
        # Only TensorFlow models have this attribute.
        return is_chief(getattr(model, "distribute_strategy", None))


def _has_workers(strategy: Any) -> bool:
    """Whether `strategy` connects several processes that run the same program."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    # Without a cluster, for example without `TF_CONFIG`, it is a `MirroredStrategy`.
    return bool(strategy.cluster_resolver.cluster_spec())


# Two changes let `fit` of Keras run on several workers. `test_keras_alone_still_fails_with_workers`
# fails for each that a new version of Keras no longer needs.


def _build_from_local_batches(model: Any, strategy: Any) -> None:
    """Builds `model` from the batch of this worker, not from an average over all workers."""
    build = model._maybe_symbolic_build

    def build_locally(iterator=None, data_batch=None):
        if iterator is not None:
            _, _, batches = next(iter(iterator))
            data_batch = keras.tree.map_structure(
                lambda value: strategy.experimental_local_results(value)[0], next(batches)
            )
        build(data_batch=data_batch)

    model._maybe_symbolic_build = build_locally


def _add_axis_to_step_outputs(model: Any) -> None:
    """Gives the scalars that a step returns an axis, which Keras averages over."""
    make = model._make_function

    def make_function(step):
        return make(lambda data: keras.tree.map_structure(lambda value: value[None], step(data)))

    model._make_function = make_function
