"""Records a training under a strategy, for comparison with one device.

Run it in a separate process, or in one per worker, with `tests` on the path:

    python strategy_record.py STRATEGY FOLDER whole|killed|resumed

STRATEGY is `default`, `mirrored-N` for N logical CPUs, or `workers`. Every process writes the
arrays of `record` to FOLDER/record-INDEX.npz; the chief also writes the history and models. With
`killed`, the last worker is killed in the middle of epoch `KILLED_IN`. With `resumed`, training
resumes from the backup in FOLDER.
"""

import os
import pathlib
import signal
import sys

import keras
import numpy as np
import tensorflow as tf
from helpers import monitor_fits, monitor_models

import keras_lipattn as kl
from keras_lipattn.distribution import SharedBackup, is_chief, multi_worker
from keras_lipattn.layers import lipschitz_layers

EPOCHS = 5
KILLED_IN = 3
BATCH = 8
EXAMPLES = 32
# Not a multiple of anything.
PREDICTED = 29


class Kill(keras.callbacks.Callback):
    """Ends the process in the middle of an epoch as a power failure would."""

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self._epoch == KILLED_IN and batch == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def make_strategy(name):
    if name == "default":
        return tf.distribute.get_strategy()
    if name == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy()
    count = int(name.removeprefix("mirrored-"))
    (cpu,) = tf.config.list_physical_devices("CPU")
    devices = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(count)])


def task(strategy):
    """Index of this process, and the number of all."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not resolver.cluster_spec():
        return 0, 1
    return resolver.task_id, resolver.cluster_spec().num_tasks("worker")


def penalty(epoch, current):
    """A schedule that depends on the current coefficient."""
    return current + 0.05


def train(strategy, folder, killed):
    """The model after twenty steps, its monitor, and the history."""
    keras.utils.set_random_seed(12)
    with strategy.scope():
        model = monitor_models.compiled(
            multi_worker(monitor_models.capped()), learning_rate=0.05, metrics=["accuracy"]
        )
    x, y = monitor_models.data(EXAMPLES)
    monitor = kl.LipschitzMonitor(penalty=penalty, target=0.1, running_freq=1)
    callbacks = [monitor]
    if is_chief(strategy):
        log = keras.callbacks.CSVLogger(str(folder / "history.csv"), append=True)
        best = keras.callbacks.ModelCheckpoint(
            str(folder / "best.keras"), "lipschitz_total", mode="min", save_best_only=True
        )
        callbacks += [log, best]
    callbacks.append(SharedBackup(str(folder / "backup"), delete_checkpoint=False))
    index, count = task(strategy)
    if killed and index == count - 1:
        callbacks.append(Kill())
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=callbacks,
    ).history
    return model, monitor, history


def record(model, monitor, history):
    """Arrays that must not depend on the strategy."""
    x, y = monitor_models.data(EXAMPLES)
    results = {f"fit_{key}": np.array(values) for key, values in history.items()}
    results |= {f"batch_{k}": np.array(v) for k, v in monitor.running_history.items()}
    results["weights"] = monitor_models.weights(model)
    for layer in lipschitz_layers(model):
        for variable in layer.non_trainable_variables:
            results[f"running_{variable.path}"] = variable.numpy()
    results["evaluated"] = np.array(model.evaluate(x, y, batch_size=BATCH, verbose=0))
    results["predicted"] = model.predict(x[:PREDICTED], batch_size=BATCH, verbose=0)
    results["certified"] = np.array(kl.certify(model).total)
    results["resumed_from"] = np.array(monitor.epochs[0])
    return results


def apart(model):
    """The largest difference between the running state of replicas in this process."""
    largest = 0.0
    for layer in lipschitz_layers(model):
        for variable in layer.non_trainable_variables:
            copies = [copy.numpy() for copy in getattr(variable.value, "values", ())]
            largest = max([largest, *(np.abs(copy - copies[0]).max() for copy in copies)])
    return largest


def main(name, folder, mode):
    folder = pathlib.Path(folder)
    strategy = make_strategy(name)
    model, monitor, history = train(strategy, folder, mode == "killed")
    results = record(model, monitor, history)
    results |= {"replicas": strategy.num_replicas_in_sync, "apart": apart(model)}
    if mode == "whole":
        with strategy.scope():
            results["gradient"] = monitor_fits.penalty_gradient()
        if is_chief(strategy):
            kl.export_saved_model(model, folder / "saved_model")
    index, _ = task(strategy)
    np.savez(folder / f"record-{index}.npz", **results)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(*sys.argv[1:])
