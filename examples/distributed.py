"""Trains one classifier under any strategy, with a penalty, and exports it with its certificate.

    python examples/distributed.py --strategy=default        one device
    python examples/distributed.py --strategy=mirrored       all GPUs, or --replicas logical CPUs
    python examples/distributed.py --strategy=multiworker    --replicas processes on this machine
    python examples/distributed.py --strategy=tpu            all cores of a TPU, see tpu.py

On several machines set `TF_CONFIG` on each of them and start the program with
`--strategy=multiworker` on all. They must share the folder --out_dir. The losses do not depend on
the strategy, since a step takes --batch_size images over all replicas. Results in --out_dir:

    history.csv       losses and certified bounds, one row per epoch
    saved_model/1/    the model, with its certificate in assets.extra/

A run that was killed resumes when it is started again.
"""

import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import keras_lipattn
from image_data import ImageData, load_images
from keras_lipattn.distribution import SharedBackup, is_chief, multi_worker
from local_workers import run_workers
from patch_transformer import Architecture, patch_transformer
from tpu import tpu_strategy

_STRATEGY = flags.DEFINE_enum(
    "strategy", "default", ("default", "mirrored", "multiworker", "tpu"), "how to distribute"
)
_REPLICAS = flags.DEFINE_integer(
    "replicas", 2, "logical CPUs or processes, if there are no GPUs", lower_bound=1
)
_TPU = flags.DEFINE_string("tpu", "local", "argument of TPUClusterResolver")
_OUT_DIR = flags.DEFINE_string("out_dir", "build/distributed", "folder of the results")
_DATA_DIR = flags.DEFINE_string("data_dir", "build/data", "folder of prepared data sets")
_EPOCHS = flags.DEFINE_integer("epochs", 10, "number of epochs", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images per step, over all replicas")
_PENALTY = flags.DEFINE_float("penalty", 0.05, "coefficient of the penalty", lower_bound=0.0)
_TARGET = flags.DEFINE_float("target", 0.95, "bound above which a layer is penalized")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the initial weights and the order of the images")
_TIMEOUT = flags.DEFINE_float("timeout", 3600.0, "seconds after which local workers are killed")

_CLASSES = 10


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    if _STRATEGY.value == "multiworker" and "TF_CONFIG" not in os.environ:
        _launch()
    else:
        _train(_make_strategy())


def _launch() -> None:
    """Runs this program as workers, and prints the output of the first one."""
    # Once, since workers on one machine would do it at the same time in the same folder.
    load_images("digits", _DATA_DIR.value)
    workers = run_workers(
        [sys.executable, *sys.argv],
        _REPLICAS.value,
        timeout=_TIMEOUT.value,
        environment={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    failed = [index for index, worker in enumerate(workers) if worker.returncode]
    print(workers[failed[0] if failed else 0].output)
    if failed:
        raise SystemExit(f"Workers failed. Received: {failed} of {len(workers)}")


def _make_strategy() -> tf.distribute.Strategy:
    if _STRATEGY.value == "mirrored":
        if tf.config.list_physical_devices("GPU"):
            return tf.distribute.MirroredStrategy()
        (cpu,) = tf.config.list_physical_devices("CPU")
        parts = [tf.config.LogicalDeviceConfiguration()] * _REPLICAS.value
        tf.config.set_logical_device_configuration(cpu, parts)
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(_REPLICAS.value)])
    if _STRATEGY.value == "multiworker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if _STRATEGY.value == "tpu":
        return tpu_strategy(_TPU.value)
    return tf.distribute.get_strategy()


def _train(strategy: tf.distribute.Strategy) -> None:
    out_dir = pathlib.Path(_OUT_DIR.value)
    data = load_images("digits", _DATA_DIR.value)
    # After the data, whose preparation draws random names.
    keras.utils.set_random_seed(_SEED.value)
    # Everything with variables must be created under the strategy.
    with strategy.scope():
        model = multi_worker(
            patch_transformer(data.train[0].shape[1:], _CLASSES, Architecture(patch=2))
        )
        model.compile(
            keras.optimizers.Adam(1e-3),
            keras_lipattn.losses.MarginCrossentropy(radius=0.2, temperature=30.0),
            metrics=["accuracy"],
        )
    callbacks: list[keras.callbacks.Callback] = [
        keras_lipattn.LipschitzMonitor(penalty=_PENALTY.value, target=_TARGET.value)
    ]
    if is_chief(strategy):
        out_dir.mkdir(parents=True, exist_ok=True)
        callbacks.append(keras.callbacks.CSVLogger(out_dir / "history.csv", append=True))
    # Last, so that the other callbacks have written their files before an epoch is backed up.
    callbacks.append(SharedBackup(out_dir / "backup"))
    model.fit(
        _batches(data.train, shuffle=True),
        validation_data=_batches(data.validation),
        epochs=_EPOCHS.value,
        callbacks=callbacks,
        verbose=2 if is_chief(strategy) else 0,
    )
    # On all workers, since all replicas take part.
    loss, accuracy = model.evaluate(_batches(data.test), verbose=0)
    if is_chief(strategy):
        _export(model, data, out_dir)
        print(f"test loss {loss:.4f}, accuracy {accuracy:.4f}")


def _batches(pairs: tuple[np.ndarray, np.ndarray], *, shuffle: bool = False) -> tf.data.Dataset:
    """Batches of one size, so that shapes are static and replicas get equal shares."""
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    if shuffle:
        # All workers shuffle in the same way, then each takes its part of every batch. One order
        # for all epochs: under a strategy Keras starts one more iteration to build the model.
        dataset = dataset.shuffle(len(pairs[0]), seed=_SEED.value, reshuffle_each_iteration=False)
    return dataset.batch(_BATCH_SIZE.value, drop_remainder=True)


def _export(model: keras.Model, data: ImageData, out_dir: pathlib.Path) -> None:
    keras_lipattn.export_saved_model(model, out_dir / "saved_model", example_batch=data.test[0][:8])


if __name__ == "__main__":
    app.run(main)
