"""NaN, infinite or very large weights are logged as `inf` and reported with the layer."""

import csv
import math

import keras
import numpy as np
import pytest
from helpers.monitor_models import KINDS, capped, compiled, dense, fit

import keras_lipattn as kl
from keras_lipattn.callbacks import LipschitzMonitor
from keras_lipattn.layers import lipschitz_layers

LARGEST = float(np.finfo(np.float32).max)


def one_epoch(model, monitor):
    """The logs of an epoch in which nothing is trained."""
    logs: dict[str, float] = {}
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    monitor.on_epoch_end(0, logs)
    return logs


def trained_weights(layer):
    return [weight for weight in layer.weights if weight.trainable]


def spoil(weight, value):
    array = weight.numpy()
    array.flat[-1] = value
    weight.assign(array)


def never_nan(monitor):
    values = [*monitor.history.values(), *monitor.running_history.values()]
    return not any(np.isnan(value).any() for value in values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("build", [KINDS["functional"], KINDS["nested"], capped])
def test_a_nan_or_infinite_weight_is_found_in_its_layer(build, value):
    for index, layer in enumerate(lipschitz_layers(build())):
        for position in range(len(trained_weights(layer))):
            model = compiled(build())
            spoil(trained_weights(lipschitz_layers(model)[index])[position], value)
            monitor = LipschitzMonitor()
            with pytest.warns(UserWarning, match="no finite Lipschitz bound from epoch 1 on"):
                logs = one_epoch(model, monitor)
            ((path, reason),) = monitor.infinite.items()
            assert path.split("/")[-1] == layer.name
            assert reason.startswith("from epoch 1 on: ") and "finite" in reason
            infinite = {key for key, bound in logs.items() if math.isinf(bound)}
            assert len(infinite) == 2 and "lipschitz_total" in infinite
            assert never_nan(monitor)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("build", [KINDS["functional"], capped])
def test_a_weight_of_1e30_is_finite_unless_the_compute_dtype_overflows(build, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(build())
    finally:
        keras.config.set_dtype_policy("float32")
    spoil(model.get_layer("head").kernel, 1e30)
    monitor = LipschitzMonitor()
    if policy == "float32":
        logs = one_epoch(model, monitor)
        assert monitor.infinite == {}
        # Caps also hold for this weight. Without a cap the bound is as large as the weight.
        bound = logs["lipschitz_head"]
        assert bound <= 0.7 if build is capped else bound >= 1e30
    else:
        # It is larger than the largest float16.
        with pytest.warns(UserWarning, match="Layer 'head' has no finite"):
            logs = one_epoch(model, monitor)
        assert list(monitor.infinite) == ["head"]
        assert math.isinf(logs["lipschitz_total"])
    assert never_nan(monitor)


def test_several_at_once_are_named_in_the_order_of_the_model():
    model = compiled(KINDS["nested"]())
    for layer in lipschitz_layers(model)[1:3]:
        spoil(layer.kernel, math.nan)
    monitor = LipschitzMonitor()
    with pytest.warns(UserWarning, match=r"Layer 'encoder-b/dense' .*\(also: encoder_a_dense\): "):
        one_epoch(model, monitor)
    assert list(monitor.infinite) == ["encoder-b/dense", "encoder_a_dense"]


def test_a_broken_layer_of_keras_is_named_too():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="plain")(inputs)
    model = compiled(keras.Model(inputs, dense(3, name="head")(x)))
    spoil(model.get_layer("plain").kernel, math.nan)
    monitor = LipschitzMonitor()
    with pytest.warns(UserWarning, match="no finite certified.*`plain`"):
        logs = one_epoch(model, monitor)
    assert list(monitor.infinite) == ["plain"]
    assert math.isinf(logs["lipschitz_total"]) and math.isfinite(logs["lipschitz_head"])


class Snapshots(keras.callbacks.Callback):
    """The bounds of all layers before each batch, in float64."""

    def on_train_begin(self, logs=None):
        self.bounds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.bounds.append(
            {layer.name: layer.lipschitz().value for layer in lipschitz_layers(self.model)}
        )


@pytest.mark.parametrize("rate", [1e3, 1e12])
def test_a_training_that_explodes_names_the_layer_that_overflows_first(tmp_path, rate):
    model = compiled(KINDS["functional"](), learning_rate=rate)
    monitor, snapshots = LipschitzMonitor(running_freq=1), Snapshots()
    history = kl.DurableCSVLogger(tmp_path / "history.csv")
    stop = keras.callbacks.TerminateOnNaN()
    with pytest.warns(UserWarning, match="has no finite Lipschitz bound from"):
        logs = fit(model, monitor, history, snapshots, stop, batch_size=1, epochs=2)
    # It stops in the first epoch, which is still logged.
    assert len(logs["loss"]) == 1 and np.isinf(logs["lipschitz_total"]).all()
    assert never_nan(monitor)
    first, reason = next(iter(monitor.infinite.items()))
    batch = int(reason.removeprefix("from batch ").split()[0])
    overflown = [{k for k, v in bounds.items() if v > LARGEST} for bounds in snapshots.bounds]
    assert first in overflown[batch - 1]
    assert not any(overflown[: batch - 1])
    (row,) = csv.DictReader((tmp_path / "history.csv").read_text().splitlines())
    assert [key for key, cell in row.items() if cell == "nan"] == ["loss"]


def test_a_training_that_explodes_is_reported_at_the_end_of_its_epoch_at_the_latest():
    model = compiled(KINDS["functional"](), learning_rate=1e12)
    monitor = LipschitzMonitor(penalty=0.1)
    with pytest.warns(UserWarning, match=r"Layer 'attention' .*epoch 1 on \(also: head\): "):
        fit(model, monitor, keras.callbacks.TerminateOnNaN(), batch_size=1, epochs=2)
    assert list(monitor.infinite) == ["attention", "head"]
    assert monitor.epochs == [0] and never_nan(monitor)
