"""Fits with a monitor, to be run under different strategies."""

import keras
import numpy as np
from helpers import monitor_models

from keras_lipattn.callbacks import LipschitzMonitor
from keras_lipattn.distribution import multi_worker


def penalty_gradient():
    """Gradient of the penalty: minus the step of gradient descent of rate 1."""
    keras.utils.set_random_seed(11)
    model = monitor_models.compiled(
        multi_worker(monitor_models.functional()),
        learning_rate=1.0,
        loss=monitor_models.without_loss,
    )
    before = monitor_models.weights(model)
    monitor = LipschitzMonitor(penalty=0.3, target=0.1)
    monitor_models.fit(model, monitor, batch_size=8)
    return before - monitor_models.weights(model)


def record():
    """Arrays that must not depend on the number of replicas, and the trained model."""
    results = {"gradient": penalty_gradient()}
    keras.utils.set_random_seed(12)
    x, y = monitor_models.data(32)
    model = monitor_models.compiled(monitor_models.capped(), learning_rate=0.05)
    monitor = LipschitzMonitor(
        penalty=lambda epoch: 0.1 * (epoch + 1),
        target=0.1,
        running_freq=1,
        lower_bound_data=x[:2],
        certified_accuracy_radii=(0.0, 0.05, 0.2),
    )
    history = model.fit(
        x,
        y,
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=[monitor],
    ).history
    results |= {key: np.array(values) for key, values in history.items()}
    results |= {f"batch_{key}": np.array(values) for key, values in monitor.running_history.items()}
    results["weights"] = monitor_models.weights(model)
    results["coefficient"] = model.get_layer("head").penalty_coefficient.numpy()
    results["evaluated"] = np.array(model.evaluate(x, y, batch_size=8, verbose=0))
    return results, model
