"""A `fit` of Keras with workers, without one of the two changes that `multi_worker` makes.

    python stock_fit.py build|steps

ends with status 3 if `fit` fails for the reason that this change removes.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import keras_lipattn as kl

FAILURES = {"build": "unsupported type", "steps": "Invalid reduction dimension 0"}


def main(left_out):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
    if left_out == "build":
        kl.distribution._add_axis_to_step_outputs(model)
    else:
        kl.distribution._build_from_local_batches(model, strategy)
    try:
        model.fit(np.ones((8, 3)), np.ones((8, 2)), batch_size=4, verbose=0)
    except (TypeError, ValueError) as error:
        print(error)
        return 3 if FAILURES[left_out] in str(error) else 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
