"""The monitor together with callbacks that read its keys, stop training, or restore weights."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.monitor_models import KINDS, compiled, data, dense, fit, weights

from keras_lipattn.callbacks import LipschitzMonitor
from keras_lipattn.layers import lipschitz_layers


class Grow(keras.callbacks.Callback):
    """Multiplies a kernel by one factor after the training of each epoch."""

    def __init__(self, kernel, factors):
        super().__init__()
        self.kernel = kernel
        self.factors = list(factors)

    def on_test_end(self, logs=None):
        self.kernel.assign(self.kernel * self.factors.pop(0))


def growing(*factors):
    """A model that learns nothing, arguments of `fit`, and a callback that multiplies a bound."""
    model = compiled(KINDS["sequential"](), learning_rate=0.0)
    options = dict(epochs=len(factors), validation_data=data())
    return model, options, Grow(model.get_layer("head").kernel, factors)


# Readers of the logs ------------------------------------------------------------------------------


def test_tensorboard_gets_every_key(tmp_path):
    monitor = LipschitzMonitor(running_freq=1)
    board = keras.callbacks.TensorBoard(tmp_path, update_freq="batch", write_graph=True)
    fit(compiled(KINDS["sequential"]()), monitor, board, epochs=2)
    scalars = {}
    for path in tmp_path.glob("train/events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.HasField("tensor"):
                    scalars.setdefault(value.tag, []).append(tf.make_ndarray(value.tensor))
    for key, values in monitor.history.items():
        # Events hold float32.
        np.testing.assert_allclose(scalars[f"epoch_{key}"], values, rtol=1e-6)
    for key, values in monitor.running_history.items():
        if key.startswith("running_"):
            np.testing.assert_allclose(scalars[f"batch_{key}"], values, rtol=1e-6)


def test_model_checkpoint_keeps_the_epoch_of_the_smallest_bound(tmp_path):
    model, options, grow = growing(0.5, 0.5, 3.0)
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}-{lipschitz_total:.3f}.keras",
        monitor="lipschitz_total",
        mode="min",
        save_best_only=True,
    )
    totals = fit(model, LipschitzMonitor(), checkpoint, grow, **options)["lipschitz_total"]
    assert totals[0] > totals[1] < totals[2]
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved == {f"{epoch + 1}-{totals[epoch]:.3f}.keras" for epoch in (0, 1)}


def test_early_stopping_stops_on_a_bound_and_restores_its_weights():
    model, options, grow = growing(0.5, 2.0, 2.0, 2.0)
    stopping = keras.callbacks.EarlyStopping(
        monitor="lipschitz_head", mode="min", patience=2, restore_best_weights=True
    )
    monitor = LipschitzMonitor()
    bounds = fit(model, monitor, stopping, grow, **options)["lipschitz_head"]
    assert len(bounds) == 3
    assert model.get_layer("head").lipschitz().value == bounds[0]
    # The certificate is for the weights before the restoration.
    assert monitor.certificate and not monitor.certificate.matches(model)


def test_learning_rate_is_reduced_on_a_plateau_of_a_bound():
    model, options, grow = growing(1.0, 2.0, 2.0)
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="lipschitz_total", mode="min", patience=1)
    model.optimizer.learning_rate = 1e-30
    rates = fit(model, LipschitzMonitor(), plateau, grow, **options)["learning_rate"]
    assert rates[-1] == pytest.approx(1e-31)


# Order ------------------------------------------------------------------------------------------


def readers(path):
    return [
        keras.callbacks.CSVLogger(path / "log.csv"),
        keras.callbacks.TensorBoard(path / "board"),
        keras.callbacks.EarlyStopping("loss"),
        keras.callbacks.ModelCheckpoint(path / "model.keras"),
        keras.callbacks.ReduceLROnPlateau("loss"),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    ]


def keys_received(callback):
    """A set, filled with the log keys that `callback` receives at the end of epochs."""
    keys = set()
    on_epoch_end = callback.on_epoch_end

    def recording(epoch, logs=None):
        keys.update(logs or {})
        on_epoch_end(epoch, logs)

    callback.on_epoch_end = recording
    return keys


KEYS = {"lipschitz_total", "lipschitz_dense", "lipschitz_head"}


@pytest.mark.parametrize("index", range(6))
def test_the_keys_reach_the_callbacks_after_the_monitor_only(tmp_path, index):
    before, after = (readers(tmp_path / name)[index] for name in ("before", "after"))
    missed, received = keys_received(before), keys_received(after)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    fit(compiled(KINDS["sequential"]()), before, LipschitzMonitor(), after)
    assert received >= KEYS
    assert not missed & KEYS


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_keras_warns_of_a_callback_that_follows_a_bound_before_the_monitor(tmp_path, name):
    kwargs = {"monitor": "lipschitz_total", "mode": "min"}
    if name == "ModelCheckpoint":
        kwargs |= {"filepath": tmp_path / "best.keras", "save_best_only": True}
    reader = getattr(keras.callbacks, name)(**kwargs)
    with pytest.warns(UserWarning, match="lipschitz_total.* available"):
        fit(compiled(KINDS["sequential"]()), reader, LipschitzMonitor())
    # After it there is no warning; warnings are errors in these tests.
    reader = getattr(keras.callbacks, name)(**kwargs)
    fit(compiled(KINDS["sequential"]()), LipschitzMonitor(), reader)


def test_callbacks_before_the_monitor_and_other_monitors_do_no_harm(tmp_path):
    before = [
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.01),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: None),
        keras.callbacks.TerminateOnNaN(),
        LipschitzMonitor(norm="linf"),
    ]
    monitor = LipschitzMonitor()
    history = fit(compiled(KINDS["sequential"]()), *before, monitor, *readers(tmp_path))
    assert history["lipschitz_total"] == monitor.history["lipschitz_total"]


@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_only_one_monitor_may_follow_the_steps(kind):
    model = compiled(KINDS[kind]())
    monitors = LipschitzMonitor(penalty=0.1), LipschitzMonitor(running_freq=2)
    with pytest.raises(ValueError, match=r"Only one monitor of a `fit`.*Received: two"):
        fit(model, *monitors)
    # The next `fit` is not affected.
    assert np.isfinite(fit(model, monitors[1], LipschitzMonitor("linf"))["running_head"]).all()


# Backup and restore -----------------------------------------------------------------------------


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise RuntimeError("stopped")


@pytest.mark.parametrize(
    "penalty",
    [lambda epoch: 0.1 * (epoch + 1), lambda epoch, coefficient: 1.5 * coefficient + 0.1],
    ids=["of the epoch", "of the coefficient"],
)
@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, penalty, kind):
    # A new model and a new monitor, as in a program that is run again.
    def run(*callbacks):
        keras.utils.set_random_seed(3)
        model = KINDS[kind]()
        # A backup needs weights to restore.
        model(data()[0])
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        monitor = LipschitzMonitor(penalty=penalty, target=0.2, running_freq=1)
        fit(model, monitor, *callbacks, epochs=4)
        return model, monitor

    whole, monitor = run()
    with pytest.raises(RuntimeError, match="stopped"):
        run(keras.callbacks.BackupAndRestore(tmp_path), Stop())
    assert json.loads((tmp_path / "training_metadata.json").read_text())["epoch"] == 2
    resumed, monitor_after = run(keras.callbacks.BackupAndRestore(tmp_path))
    assert monitor_after.epochs == [2, 3]
    np.testing.assert_array_equal(weights(resumed), weights(whole))
    for one, other in zip(lipschitz_layers(whole), lipschitz_layers(resumed), strict=True):
        for variable, again in zip(
            one.non_trainable_variables, other.non_trainable_variables, strict=True
        ):
            np.testing.assert_array_equal(again.numpy(), variable.numpy())
    for key, values in monitor.history.items():
        assert monitor_after.history[key] == values[2:]


def test_a_number_replaces_the_restored_coefficient(tmp_path):
    def run(penalty, *callbacks):
        model = compiled(KINDS["sequential"](), learning_rate=0.0)
        fit(
            model,
            LipschitzMonitor(penalty=penalty, target=0.2),
            keras.callbacks.BackupAndRestore(tmp_path),
            *callbacks,
            epochs=3,
        )
        return float(model.get_layer("head").penalty_coefficient.numpy())

    with pytest.raises(RuntimeError, match="stopped"):
        run(0.25, Stop())
    assert run(0.5) == 0.5


# Broken weights -----------------------------------------------------------------------------------


def user_warnings(caught):
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_broken_weights_are_reported_with_the_first_broken_layer(tmp_path):
    model = compiled(KINDS["sequential"](), learning_rate=0.0)

    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.name = {1: "head", 2: "dense"}.get(epoch)

        def on_train_batch_end(self, batch, logs=None):
            # After the last step, since gradients would spread a NaN to every layer.
            if batch == 1 and self.name:
                kernel = model.get_layer(self.name).kernel
                kernel.assign(kernel * math.nan)

    monitor = LipschitzMonitor()
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    with pytest.warns(UserWarning) as caught:
        fit(model, monitor, logger, Break(), epochs=3)
    messages = user_warnings(caught)
    assert len(messages) == 2
    assert messages[0].startswith("Layer 'head' has no finite Lipschitz bound from epoch 2 on: ")
    assert messages[1].startswith("Layer 'dense' has no finite Lipschitz bound from epoch 3 on: ")
    assert all("finite" in message.split(": ", 1)[1] for message in messages)
    assert np.isinf(monitor.history["lipschitz_head"]).tolist() == [False, True, True]
    assert np.isinf(monitor.history["lipschitz_dense"]).tolist() == [False, False, True]
    assert np.isinf(monitor.history["lipschitz_total"]).tolist() == [False, True, True]
    assert not any(np.isnan(values).any() for values in monitor.history.values())
    assert "inf" in (tmp_path / "log.csv").read_text()


def test_running_bounds_find_broken_weights_within_the_epoch():
    model = compiled(KINDS["sequential"](), learning_rate=0.0)

    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                kernel = model.get_layer("head").kernel
                kernel.assign(kernel * math.nan)

    monitor = LipschitzMonitor(running_freq=1)
    with pytest.warns(UserWarning) as caught:
        fit(model, monitor, Break())
    first, second = user_warnings(caught)
    assert first.startswith("Layer 'head' has no finite Lipschitz bound from batch 2 of epoch 1")
    # The step spreads the NaN.
    assert second.startswith("Layer 'dense' has no finite Lipschitz bound from epoch 1 on: ")
    assert np.isinf(monitor.running_history["running_head"]).tolist() == [False, True]
    assert np.isfinite(monitor.running_history["running_dense"]).all()


def test_a_model_without_finite_bound_is_reported_once_with_the_reason():
    inputs = keras.Input((5, 6))
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(inputs))
    x = keras.layers.Activation("sparsemax", name="sparse")(keras.layers.Dense(4)(x))
    model = compiled(keras.Model(inputs, dense(3, name="head")(x)))
    with pytest.warns(UserWarning, match="The model has no finite certified.*`sparse`") as caught:
        history = fit(model, LipschitzMonitor(), epochs=2)
    assert len(user_warnings(caught)) == 1
    assert history["lipschitz_total"] == [math.inf] * 2
    assert np.isfinite(history["lipschitz_head"]).all()
