"""The monitor counts certified examples during validation, with the certificate of the epoch."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import keras
import numpy as np
import pytest
from helpers import monitor_models
from helpers.monitor_models import CLASSES, FEATURES, KINDS, TOKENS, compiled, data, without_loss
from keras import ops

import keras_lipattn as kl
from keras_lipattn import LipschitzMonitor

RADII = (0.0, 0.05, 0.2)
KEYS = [f"val_certified_accuracy_{name}" for name in ("0", "0_05", "0_2")]


def separable(examples=64, seed=3):
    """Examples whose classes differ, so that some are certified."""
    random = np.random.default_rng(seed)
    y = random.integers(0, CLASSES, examples)
    x = random.standard_normal((examples, TOKENS, FEATURES))
    x[np.arange(examples), :, y] += 2.0
    return x.astype("float32"), y


def softmax():
    model = monitor_models.functional()
    return keras.Model(model.input, keras.layers.Softmax()(model.output), name="softmax")


def log_softmax():
    model = monitor_models.functional()
    outputs = keras.layers.Activation("log_softmax")(model.output)
    return keras.Model(model.input, outputs, name="log_softmax")


class Recorded(keras.callbacks.Callback):
    """What `certified_accuracy` says at the end of every epoch; after the monitor."""

    def __init__(self, x, y, norm="l2", **options):
        super().__init__()
        self.data, self.norm, self.rows, self.logs = (x, y), norm, [], []
        self.options = options

    def on_epoch_end(self, epoch, logs=None):
        found = kl.certified_accuracy(
            self.model, *self.data, radii=RADII, norm=self.norm, **self.options
        )
        self.rows.append([found.certified(radius) if radius else found.clean for radius in RADII])
        self.logs.append([(logs or {})[key] for key in KEYS])


def fit(model, monitor, *others, targets=None, **options):
    x, y = separable()
    options = {"epochs": 3, "batch_size": 16, "validation_batch_size": 24, "verbose": 0, **options}
    y = y if targets is None else targets
    options.setdefault("validation_data", (x, y))
    return model.fit(x, y, callbacks=[monitor, *others], **options).history


@pytest.mark.parametrize("norm", ["l2", "token"])
@pytest.mark.parametrize(
    "make", [*KINDS.values(), softmax, log_softmax], ids=lambda make: make.__name__
)
def test_it_is_the_certified_accuracy_of_the_model(make, norm):
    keras.utils.set_random_seed(1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=make is not softmax)
    model = compiled(make(), learning_rate=0.3, loss=loss)
    monitor = LipschitzMonitor(norm, certified_accuracy_radii=RADII)
    recorded = Recorded(*separable(), norm)
    history = fit(model, monitor, recorded)
    assert len({tuple(row) for row in recorded.rows}) > 1
    # The mean of the metric is in float32; no example is near the edge of its radius.
    np.testing.assert_allclose(recorded.logs, recorded.rows, rtol=0, atol=1e-6)
    for key, column in zip(KEYS, np.transpose(recorded.logs), strict=True):
        assert history[key] == monitor.history[key] == list(column)
    assert np.all(np.diff(recorded.logs, axis=1) <= 0.0)
    assert monitor.certificate.matches(model)


def test_half_precision_probabilities_count_no_more_than_their_logits():
    """In float16 they become 0 below 6e-8, which is no proof of a margin above 16."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((TOKENS, FEATURES))
    kernel = keras.initializers.RandomNormal(stddev=10.0, seed=0)
    head = keras.layers.Dense(CLASSES, "softmax", kernel_initializer=kernel, dtype="float16")
    x = keras.layers.GlobalAveragePooling1D()(monitor_models.dense()(inputs))
    model = keras.Model(inputs, head(x))
    radii = tuple(np.linspace(0.0, 3.0, 31).tolist())
    x, _ = separable()
    y = model.predict(x, verbose=0).argmax(axis=-1)
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    monitor = LipschitzMonitor(certified_accuracy_radii=radii)
    fit(model, monitor, targets=y, validation_data=(x, y), epochs=1)
    exact = kl.certified_accuracy(model, x, y, radii=radii)
    logged = [value for key, (value,) in monitor.history.items() if key.startswith("val_certified")]
    assert len(logged) == len(radii) and logged[0] == 1.0 and logged[-1] == 0.0
    for radius, share in zip(radii, logged, strict=True):
        assert share <= exact.certified(radius) + 1e-6


def test_examples_outside_of_the_certificate_do_not_count():
    keras.utils.set_random_seed(1)
    model = compiled(monitor_models.functional(), learning_rate=0.3)
    x, y = separable()
    radius = float(np.median(np.linalg.norm(x, axis=-1).max(axis=-1)))
    monitor = LipschitzMonitor("l2", certified_accuracy_radii=RADII, input_radius=radius)
    recorded = Recorded(x, y, input_radius=radius)
    fit(model, monitor, recorded)
    np.testing.assert_allclose(recorded.logs, recorded.rows, rtol=0, atol=1e-6)
    assert recorded.rows[-1][0] > 0.6 and 0.0 < recorded.rows[-1][1] <= 0.5


@pytest.mark.parametrize("shape", ["one-hot", "column"])
def test_targets_have_any_shape_that_keras_takes(shape):
    _, y = separable()
    histories = []
    for targets in (y, np.eye(CLASSES)[y] if shape == "one-hot" else y[:, None]):
        keras.utils.set_random_seed(1)
        model = compiled(monitor_models.sequential(), loss=without_loss)
        monitor = LipschitzMonitor(certified_accuracy_radii=RADII)
        fit(model, monitor, targets=targets, epochs=1)
        histories.append([monitor.history[key] for key in KEYS])
    assert histories[0] == histories[1] and histories[0][0] != [0.0]


def test_sample_weights_count():
    x, y = separable()
    keras.utils.set_random_seed(1)
    model = compiled(monitor_models.sequential())
    classes = np.argmax(model.predict(x, verbose=0), axis=-1)
    weights = (classes == y).astype("float32")
    monitor = LipschitzMonitor(certified_accuracy_radii=(0.0,))
    model.optimizer.learning_rate = 0.0
    fit(model, monitor, validation_data=(x, y, weights), epochs=1)
    assert monitor.history[KEYS[0]] == [1.0]


def test_it_is_for_the_weights_that_are_validated():
    keras.utils.set_random_seed(1)
    model = compiled(monitor_models.functional(), learning_rate=0.3)
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.95)
    model.compile(optimizer, model.loss, jit_compile=False)
    swap = keras.callbacks.SwapEMAWeights()
    seen = []

    class InValidation(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            found = kl.certified_accuracy(self.model, *separable(), radii=RADII)
            seen.append([found.clean, *(found.certified(radius) for radius in RADII[1:])])

        def on_epoch_end(self, epoch, logs=None):
            # The other bounds are for the weights at the end of the epoch.
            assert monitor.certificate.matches(self.model)

    monitor = LipschitzMonitor(certified_accuracy_radii=RADII)
    # The swap is undone by callbacks in their order: this one looks before.
    fit(model, monitor, InValidation(), swap)
    np.testing.assert_allclose(
        np.transpose([monitor.history[key] for key in KEYS]), seen, rtol=0, atol=1e-6
    )


class Counting(monitor_models.Subclassed):
    """Counts the examples that it is called on."""

    def __init__(self):
        super().__init__("first")
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def test_step(self, data):
        self.count.assign_add(ops.cast(ops.shape(data[0])[0], "float32"))
        return super().test_step(data)


def test_validation_runs_once():
    model = compiled(Counting())
    fit(model, LipschitzMonitor(certified_accuracy_radii=RADII))
    assert float(model.count) == 3 * 64


def test_the_model_is_left_as_it_was():
    model = compiled(monitor_models.sequential(), metrics=["accuracy"])
    x, y = separable()
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    function = model.test_function
    model.optimizer.learning_rate = 0.0
    history = fit(model, LipschitzMonitor(certified_accuracy_radii=RADII))
    assert history["val_accuracy"] == history[KEYS[0]]
    assert model.test_function is function and "compute_metrics" not in vars(model)
    assert model.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(before)
    assert set(before) == {"loss", "accuracy"}


def test_a_validation_that_fails_leaves_no_trace():
    model = compiled(monitor_models.sequential())

    class Failing(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise RuntimeError("stop")

    monitor = LipschitzMonitor(certified_accuracy_radii=RADII)
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, monitor, Failing())
    again = LipschitzMonitor(certified_accuracy_radii=(0.05,))
    history = fit(model, again)
    assert len(history[KEYS[1]]) == 3 and KEYS[2] not in history
    x, y = separable()
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss"}


def test_callbacks_can_follow_it():
    model = compiled(monitor_models.sequential())
    stop = keras.callbacks.EarlyStopping(KEYS[2], mode="max", patience=1)
    history = fit(model, LipschitzMonitor(certified_accuracy_radii=RADII), stop, epochs=2)
    assert stop.best is not None and len(history[KEYS[2]]) == 2


def test_only_validated_epochs_have_it():
    model = compiled(monitor_models.sequential())
    monitor = LipschitzMonitor(certified_accuracy_radii=RADII)
    with pytest.warns(UserWarning, match="first epoch had no validation"):
        history = fit(model, monitor, epochs=4, validation_freq=2)
    assert len(history[KEYS[0]]) == 2 and len(history["lipschitz_total"]) == 4


def test_no_validation_is_a_warning():
    model = compiled(monitor_models.sequential())
    monitor = LipschitzMonitor(certified_accuracy_radii=RADII)
    with pytest.warns(UserWarning, match="needs `validation_data`"):
        monitor_models.fit(model, monitor)
    assert KEYS[0] not in monitor.history


def test_only_classifiers_have_it():
    inputs = keras.Input((TOKENS, FEATURES))
    model = compiled(keras.Model(inputs, monitor_models.dense()(inputs)), loss="mse")
    x, _ = data()
    monitor = LipschitzMonitor(certified_accuracy_radii=RADII)
    with pytest.raises(ValueError, match=r"(?s)for classifiers.*Received"):
        model.fit(x, x, validation_data=(x, x), verbose=0, callbacks=[monitor])


@pytest.mark.parametrize("radii", [(-0.1,), (float("nan"),), ("near",)])
def test_radii_are_nonnegative_numbers(radii):
    with pytest.raises(ValueError, match=r"certified_accuracy_radii.*Received"):
        LipschitzMonitor(certified_accuracy_radii=radii)


def test_more_classes_than_pairs_use_the_total(monkeypatch):
    monkeypatch.setattr("keras_lipattn.certification.classifier_head.MOST_PAIRED_CLASSES", 2)
    model = compiled(monitor_models.sequential(), learning_rate=0.3)
    recorded = Recorded(*separable())
    fit(model, LipschitzMonitor(certified_accuracy_radii=RADII), recorded)
    np.testing.assert_allclose(recorded.logs, recorded.rows, rtol=0, atol=1e-6)
