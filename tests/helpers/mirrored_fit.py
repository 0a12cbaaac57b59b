"""Writes the record of `monitor_fits` under MirroredStrategy on two logical CPUs.

It also contains the largest difference between the running vectors of the replicas.

Run it in a separate process, with the folder of the tests on the path:

    python mirrored_fit.py OUTPUT.npz
"""

import sys

import numpy as np
import tensorflow as tf


def main(path):
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    from helpers import monitor_fits

    from keras_lipattn.layers import lipschitz_layers

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        results, model = monitor_fits.record()
    apart = 0.0
    for layer in lipschitz_layers(model):
        for variable in layer.non_trainable_variables:
            first, second = (copy.numpy() for copy in variable.value.values)
            apart = max(apart, np.abs(first - second).max())
    results |= {"replicas": np.array(strategy.num_replicas_in_sync), "apart": np.array(apart)}
    np.savez(path, **results)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(sys.argv[1])
