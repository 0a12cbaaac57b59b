"""The monitor in `fit` on this backend: logs, penalties, running vectors."""

import keras
import numpy as np
import pytest
from helpers import monitor_models
from shared import cases

import keras_lipattn as kl


@pytest.fixture(scope="module")
def trained():
    return cases.trained(monitor_models.capped)


def test_logs_hold_certified_and_running_bounds(trained):
    model, history = trained
    names = ("attention", "head")
    keys = {f"{word}_{name}" for word in ("lipschitz", "running") for name in names}
    assert history.keys() == {"loss", "val_loss", "lipschitz_total", *keys}
    assert all(len(values) == cases.EPOCHS for values in history.values())
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["lipschitz_total"][-1] == kl.certify(model).total
    for name in names:
        # One power step a batch follows these small kernels to a few parts in a thousand.
        np.testing.assert_allclose(
            history[f"running_{name}"][-1], history[f"lipschitz_{name}"][-1], rtol=0.1
        )


def test_running_vectors_follow_the_weights():
    model = cases.with_weights(monitor_models.functional())
    layer = model.get_layer("head")
    before = keras.ops.convert_to_numpy(layer._vectors["kernel"])
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
    monitor_models.fit(model, kl.LipschitzMonitor(running_freq=1), epochs=20)
    after = keras.ops.convert_to_numpy(layer._vectors["kernel"])
    assert np.abs(after - before).max() > 1e-3
    image = keras.ops.convert_to_numpy(layer.kernel) @ after
    exact = np.linalg.norm(keras.ops.convert_to_numpy(layer.kernel), 2)
    np.testing.assert_allclose(np.linalg.norm(image), exact, rtol=0.02)


def test_the_penalty_brings_bounds_down_and_stays_out_of_the_validation_loss():
    x, y = cases.data()
    free, pushed = (cases.trained(penalty=penalty, epochs=6) for penalty in (None, 1.0))
    name = "lipschitz_attention"
    assert pushed[1][name][-1] < 0.9 * free[1][name][-1]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain = float(keras.ops.convert_to_numpy(loss(y, pushed[0](x))))
    # What `fit` reports is a mean over batches in float32.
    np.testing.assert_allclose(pushed[1]["val_loss"][-1], plain, rtol=1e-5)
    assert pushed[1]["loss"][-1] > 1.1 * pushed[1]["val_loss"][-1]


def test_a_fit_without_monitor_is_free_of_what_came_before():
    model, _ = cases.trained()
    reference = cases.with_weights(monitor_models.functional())
    reference.set_weights(model.get_weights())
    losses = []
    for each in (model, reference):
        each.compile(keras.optimizers.SGD(0.05), "mse")
        losses.append(
            each.fit(cases.data()[0], np.zeros((8, 3), "float32"), verbose=0, shuffle=False).history
        )
    np.testing.assert_allclose(losses[0]["loss"], losses[1]["loss"], rtol=1e-6)
