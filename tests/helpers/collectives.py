"""Counts the collectives in the graph of one training step, with and without a monitor.

    python collectives.py OUTPUT.json

writes their number by size, for each way to train.
"""

import collections
import json
import sys

import keras
import tensorflow as tf
from helpers import monitor_models

from keras_lipattn.distribution import is_chief, multi_worker
from keras_lipattn.layers import Tracking, lipschitz_layers

WAYS = {
    "no monitor": None,
    "running bounds": Tracking(),
    "penalty": Tracking(penalize=True),
}


def collectives(strategy, tracking):
    """Counts of the collectives in a step, by operation and number of entries sent."""
    with strategy.scope():
        model = multi_worker(monitor_models.compiled(monitor_models.capped()))
        model.optimizer.build(model.trainable_variables)
    x, y = monitor_models.data(8)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8, drop_remainder=True)
    batch = next(iter(strategy.experimental_distribute_dataset(dataset)))
    for layer in lipschitz_layers(model):
        layer.tracking = tracking
    step = tf.function(lambda data: strategy.run(model.train_step, (data,)))
    graph = step.get_concrete_function(batch).graph
    found = collections.Counter()
    for operation in graph.get_operations():
        if operation.type.startswith("Collective"):
            found[f"{operation.type} of {operation.inputs[0].shape.num_elements()}"] += 1
    weights = sum(variable.value.shape.num_elements() for variable in model.trainable_variables)
    return {"collectives": found, "weights": weights}


def main(path):
    keras.utils.set_random_seed(0)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    found = {name: collectives(strategy, tracking) for name, tracking in WAYS.items()}
    if is_chief(strategy):
        with open(path, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
