"""Keys and values that the monitor logs."""

import csv
import math
import pathlib

import keras
import numpy as np
import pytest
from helpers.monitor_models import KINDS, Subclassed, attention, compiled, data, dense, fit

import keras_lipattn as kl
from keras_lipattn.callbacks import LipschitzMonitor
from keras_lipattn.layers import lipschitz_layers

EXPECTED = {
    "sequential": {"dense", "head"},
    "functional": {"attention", "head"},
    "nested": {"encoder_a_dense", "encoder_b_dense", "encoder_a_dense_2", "total_2"},
    "shared": {"attention", "head"},
    "subclassed": {"first", "second", "head"},
}


def fitted(kind, callbacks, **kwargs):
    model = compiled(KINDS[kind]())
    fit(model, *callbacks, **{"epochs": 2, **kwargs})
    return model


class Logs(keras.callbacks.Callback):
    """Keeps the logs of every epoch as they come."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(dict(logs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_name_every_layer_once_in_every_epoch(kind):
    logs = Logs()
    # A subclassed model gets its weights just before the first batch.
    fitted(kind, [LipschitzMonitor(), logs])
    expected = {"loss", "lipschitz_total", *(f"lipschitz_{key}" for key in EXPECTED[kind])}
    assert [set(seen) for seen in logs.seen] == [expected] * 2
    assert all(key.isidentifier() for key in expected)
    assert all(type(value) is float for seen in logs.seen for value in seen.values())


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_values_are_those_of_the_certificate(kind):
    monitor = LipschitzMonitor(norm="token")
    model = fitted(kind, [monitor], epochs=1)
    certificate = kl.certify(model, norm="token")
    assert monitor.certificate == certificate
    assert monitor.history["lipschitz_total"][-1] == certificate.total
    assert monitor.epochs == [0]
    assert model.history.history["lipschitz_total"] == monitor.history["lipschitz_total"]


def test_a_shared_layer_is_logged_with_its_largest_constant():
    monitor = LipschitzMonitor()
    model = fitted("shared", [monitor], epochs=1)
    layer = model.get_layer("attention")
    by_mask = [layer.lipschitz(mask=mask).value for mask in ("full", "causal")]
    assert by_mask[0] != by_mask[1]
    assert monitor.history["lipschitz_attention"][-1] == pytest.approx(max(by_mask), rel=1e-12)


def test_a_layer_in_two_models_is_logged_once():
    layer = dense()
    inputs = keras.Input((5, 6))
    first = keras.Sequential([keras.Input((5, 6)), layer], name="first")
    second = keras.Sequential([keras.Input((5, 6)), layer], name="second")
    model = compiled(keras.Model(inputs, second(first(inputs))), loss="mse")
    monitor = LipschitzMonitor()
    x, _ = data()
    model.fit(x, x, verbose=0, callbacks=[monitor])
    assert set(monitor.history) == {"lipschitz_total", "lipschitz_first_dense"}


class Block(keras.layers.Layer):
    """A layer whose rule does not describe its inner layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention()

    def build(self, input_shape):
        self.attention.build(input_shape)

    def call(self, inputs, training=None):
        return self.attention(inputs, training=training, use_causal_mask=True)


def test_a_layer_with_unknown_calls_is_logged_for_any_mask():
    kl.register_rule(Block)(lambda layer, call: 7.0)
    model = compiled(keras.Sequential([keras.Input((5, 6)), Block(name="block")]), loss="mse")
    monitor = LipschitzMonitor()
    x, _ = data()
    model.fit(x, x, verbose=0, callbacks=[monitor])
    (layer,) = lipschitz_layers(model)
    assert monitor.history["lipschitz_block_attention"] == [layer.lipschitz(mask="any").value]
    assert monitor.history["lipschitz_total"] == [pytest.approx(7.0)]


def test_layers_with_equal_names_have_different_keys():
    model = compiled(Subclassed("twin", "twin"))
    fit(model, monitor := LipschitzMonitor())
    expected = {"twin", "twin_2", "head"}
    assert set(monitor.history) == {"lipschitz_total", *(f"lipschitz_{key}" for key in expected)}
    (first,), (second,) = (monitor.history[f"lipschitz_{key}"] for key in ("twin", "twin_2"))
    assert first != second
    assert [first, second] == [block.lipschitz().value for block in model.blocks]
    assert math.isfinite(monitor.history["lipschitz_total"][0])


# Keras warns about the layer that is never built, which this test needs.
@pytest.mark.filterwarnings("ignore:`build")
def test_a_layer_that_never_runs_is_not_logged():
    model = compiled(KINDS["subclassed"]())
    model.unused = dense(name="unused")
    fit(model, monitor := LipschitzMonitor())
    assert set(monitor.history) == {
        "lipschitz_total",
        *(f"lipschitz_{key}" for key in EXPECTED["subclassed"]),
    }


def test_running_bounds_come_every_few_batches_and_every_epoch():
    monitor = LipschitzMonitor(running_freq=2)
    batches = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append((batch, "running_head" in logs))
    )
    logs = Logs()
    model = fitted("functional", [monitor, watch, logs], batch_size=2, epochs=2)
    assert batches == [(0, False), (1, True), (2, False), (3, True)] * 2
    assert monitor.running_history["epoch"] == [0, 0, 1, 1]
    assert monitor.running_history["batch"] == [1, 3, 1, 3]
    running = {f"running_{key}" for key in EXPECTED["functional"]}
    assert set(monitor.running_history) == {"epoch", "batch", *running}
    for seen in logs.seen:
        assert running <= set(seen)
        # One power step per batch on warm vectors, with small changes of the weights.
        for key in EXPECTED["functional"]:
            assert seen[f"running_{key}"] == pytest.approx(seen[f"lipschitz_{key}"], rel=0.1)
    assert logs.seen[-1]["running_head"] == float(model.get_layer("head").running_bound.numpy())


def test_running_bounds_count_batches_that_run_together():
    monitor = LipschitzMonitor(running_freq=3)
    model = compiled(KINDS["sequential"](), steps_per_execution=2)
    model.fit(*data(16), batch_size=2, verbose=0, callbacks=[monitor])
    # Steps end with batches 1, 3, 5 and 7. The third and sixth batch end with 3 and 5.
    assert monitor.running_history["batch"] == [3, 5]


def test_without_penalty_and_running_bounds_training_is_untouched():
    plain, watched = (compiled(KINDS["sequential"]()) for _ in range(2))
    watched.set_weights(plain.get_weights())
    expected = fit(plain, epochs=2)["loss"]
    functions = []
    spy = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: functions.append(watched.train_function)
    )
    assert fit(watched, LipschitzMonitor(), spy, epochs=2)["loss"] == expected
    assert len(set(functions)) == 1 and functions[0] is watched.train_function


def test_csv_has_every_column_and_parses(tmp_path: pathlib.Path):
    path = tmp_path / "history.csv"
    monitor = LipschitzMonitor(running_freq=1)
    fitted("nested", [monitor, keras.callbacks.CSVLogger(path)], epochs=3)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for key, values in monitor.history.items():
        assert [float(row[key]) for row in rows] == values


def test_inference_is_condensed_at_the_end_unless_told_not_to():
    def capped():
        return compiled(
            keras.Sequential([keras.Input((6,)), dense(4, spectral_norm=0.1, use_bias=False)]),
            loss="mse",
        )

    x = np.random.default_rng(3).standard_normal((16, 6)).astype("float32")
    for condense in (True, False):
        model = capped()
        model.fit(x, x[:, :4], verbose=0, callbacks=[LipschitzMonitor(condense=condense)])
        (layer,) = lipschitz_layers(model)
        # The norms of the trained kernel are stored before the first inference.
        assert layer.caps_are_exact() == condense
        kernel = layer.kernel.numpy().astype(np.float64)
        exact = x @ (kernel * 0.1 / np.linalg.norm(kernel, 2))
        error = np.abs(model(x).numpy() - exact).max() / np.abs(exact).max()
        # Float32 roundoff, and the allowance of 1e-6 in the norms.
        assert error < 1e-5


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_a_length_left_open_is_taken_from_the_monitor(norm):
    inputs = keras.Input((None, 6))
    x = keras.layers.GlobalAveragePooling1D()(attention()(inputs))
    model = compiled(keras.Model(inputs, dense(3, name="head")(x)))
    monitor = LipschitzMonitor(norm=norm, sequence_length=5, penalty=0.1, running_freq=1)
    fit(model, monitor)
    expected = model.get_layer("attention").lipschitz(5, norm=norm).value
    assert monitor.history["lipschitz_attention"] == [expected]
    assert math.isfinite(monitor.history["lipschitz_total"][0])
    assert monitor.history["running_attention"][0] == pytest.approx(expected, rel=0.2)


def test_history_starts_again_with_every_fit():
    monitor = LipschitzMonitor()
    model = fitted("sequential", [monitor])
    fit(model, monitor, initial_epoch=2, epochs=5)
    assert monitor.epochs == [2, 3, 4]
    assert {len(values) for values in monitor.history.values()} == {3}


@pytest.mark.parametrize(
    ("kind", "norm"), [("nested", "linf"), ("shared", "l2"), ("subclassed", "token")]
)
def test_lower_bounds_are_below_every_certified_bound(kind, norm):
    logs = Logs()
    fitted(kind, [LipschitzMonitor(norm, lower_bound_data=data()[0][:2]), logs], epochs=2)
    for seen in logs.seen:
        certified = {key[10:]: seen[key] for key in seen if key.startswith("lipschitz_")}
        lower = {key[6:]: seen[key] for key in seen if key.startswith("lower_")}
        assert set(lower) == set(certified) == {"total", *EXPECTED[kind]}
        # Lower bounds are measured in float32.
        assert all(0.0 < lower[key] <= certified[key] * (1 + 1e-5) for key in lower)
        assert all(type(value) is float for value in lower.values())
    # For a linear layer a few steps are nearly exact.
    assert lower["head" if "head" in lower else "total_2"] > 0.5 * max(
        certified["head" if "head" in certified else "total_2"], 0.0
    )


def test_lower_bounds_do_not_change_training_or_the_model():
    weights = []
    for sample in (None, data()[0][:2]):
        keras.utils.set_random_seed(5)
        model = compiled(KINDS["functional"]())
        fit(model, LipschitzMonitor(lower_bound_data=sample), epochs=2)
        weights.append([w.tobytes() for w in model.get_weights()])
        assert all("call" not in vars(layer) for layer in lipschitz_layers(model))
    assert weights[0] == weights[1]


def test_layers_after_integer_inputs_are_measured_with_their_masks():
    ids = keras.Input((5,), dtype="int32")
    x = attention()(keras.layers.Embedding(7, 6, mask_zero=True)(ids))
    model = compiled(keras.Model(ids, dense(3, name="head")(x[:, 0])))
    sample = np.array([[1, 2, 3, 0, 0]])
    model.fit(
        sample, np.array([1]), verbose=0, callbacks=[m := LipschitzMonitor(lower_bound_data=sample)]
    )
    assert m.history["lower_total"] == [0.0]
    assert 0.0 < m.history["lower_attention"][0] <= m.history["lipschitz_attention"][0]


@pytest.mark.parametrize("sample", [np.zeros((0, 5, 6)), np.float32(1.0), []])
def test_samples_are_batches(sample):
    with pytest.raises(ValueError, match=r"`lower_bound_data` must be.*Received"):
        LipschitzMonitor(lower_bound_data=sample)


def test_samples_that_do_not_fit_are_refused_before_the_first_batch():
    model = compiled(KINDS["functional"]())
    before = model.get_weights()
    with pytest.raises(ValueError, match="`lower_bound_data` must be"):
        fit(model, LipschitzMonitor(lower_bound_data=np.zeros((2, 5, 7))))
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
