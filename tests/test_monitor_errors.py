"""Errors of the monitor."""

import keras
import numpy as np
import pytest
from helpers.monitor_models import KINDS, Subclassed, attention, compiled, data, dense, fit

from keras_lipattn.callbacks import LipschitzMonitor


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "l1"},
        {"sequence_length": 0},
        {"sequence_length": 2.5},
        {"running_freq": 0},
        {"running_freq": True},
        {"penalty": -0.1},
        {"penalty": float("nan")},
        {"penalty": float("inf")},
        {"penalty": True},
        {"penalty": "0.1"},
        {"target": 0.0},
        {"target": -1.0},
        {"target": float("inf")},
        {"target": {"head": 0.0}},
        {"target": {"head": None}},
        {"target": [1.0]},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_with_what_was_received(arguments):
    ((name, value),) = arguments.items()
    shown = value["head"] if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=f"`{name}` must be") as caught:
        LipschitzMonitor(**arguments)
    assert "Received: " in str(caught.value).splitlines()[-1]
    assert repr(shown) in str(caught.value).split("Received: ")[1]


@pytest.mark.parametrize("returned", [-1.0, float("nan"), float("inf"), [1.0, 2.0]])
def test_schedules_must_return_coefficients(returned):
    monitor = LipschitzMonitor(penalty=lambda epoch: returned)
    with pytest.raises(ValueError, match=r"schedule `penalty`.*for epoch 0\. Received: "):
        fit(compiled(KINDS["sequential"]()), monitor)


def test_a_penalty_set_later_is_checked_too():
    monitor = LipschitzMonitor(penalty=1.0)
    monitor.penalty = -1.0
    with pytest.raises(ValueError, match=r"`penalty` must be.*Received: -1\.0"):
        fit(compiled(KINDS["sequential"]()), monitor)


def test_a_model_without_lipschitz_layers_is_refused():
    model = keras.Sequential(
        [keras.Input((5, 6)), keras.layers.Flatten(), keras.layers.Dense(3, name="only")]
    )
    with pytest.raises(ValueError, match=r"no Lipschitz layer.*Received: .*'only'"):
        fit(compiled(model), LipschitzMonitor())


class OwnStep(Subclassed):
    """A model whose `train_step` calls it on something else than the inputs of `fit`."""

    def train_step(self, data):
        return super().train_step((data[0]["x"], data[1]))


@pytest.mark.parametrize("arguments", [{"penalty": 0.1}, {"running_freq": 1}], ids=str)
def test_weights_must_exist_where_the_first_step_needs_them(arguments):
    model = compiled(OwnStep("first"))
    x, y = data()

    def losses():
        monitor = LipschitzMonitor(**arguments)
        return model.fit({"x": x}, y, verbose=0, callbacks=[monitor]).history["loss"]

    with pytest.raises(ValueError, match=r"model.build\(input_shape\).*not built in its layers"):
        losses()
    model(x)
    assert np.isfinite(losses()).all()


def test_unknown_names_of_targets_are_refused():
    monitor = LipschitzMonitor(target={"head": 1.0, "haed": 1.0})
    with pytest.raises(ValueError, match=r"not watched.*\['haed'\].*'head'.*Received: "):
        fit(compiled(KINDS["sequential"]()), monitor)


def open_length():
    inputs = keras.Input((None, 6))
    x = keras.layers.GlobalAveragePooling1D()(attention()(inputs))
    return compiled(keras.Model(inputs, dense(3, name="head")(x)))


def test_a_penalized_layer_needs_its_number_of_tokens():
    with pytest.raises(ValueError, match=r"'attention' cannot be penalized.*number of tokens"):
        fit(open_length(), LipschitzMonitor(penalty=0.1))


def test_a_layer_that_is_not_penalized_does_not():
    monitor = LipschitzMonitor(penalty=0.1, target={"head": 0.1}, running_freq=1)
    with pytest.warns(UserWarning, match="'attention' has no finite Lipschitz bound"):
        history = fit(open_length(), monitor)
    assert history["running_attention"] == history["lipschitz_attention"] == [np.inf]
    assert np.isfinite(history["running_head"] + history["loss"]).all()


def test_a_penalized_layer_needs_an_activation_of_known_constant():
    model = KINDS["sequential"]()
    model.get_layer("dense").activation = lambda x: x * x
    with pytest.raises(ValueError, match=r"'dense' cannot be penalized.*Received: .*activation"):
        fit(compiled(model), LipschitzMonitor(penalty=0.1))


def test_a_penalized_layer_needs_finite_weights():
    model = KINDS["sequential"]()
    kernel = model.get_layer("dense").kernel
    kernel.assign(kernel * np.nan)
    with pytest.raises(ValueError, match=r"'dense' cannot be penalized.*Received: .*NaN"):
        fit(compiled(model), LipschitzMonitor(penalty=0.1))


def test_an_error_at_the_beginning_leaves_the_model_as_it_was():
    model = compiled(KINDS["sequential"](), learning_rate=0.0)

    class Fails(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise RuntimeError("after the monitor")

    plain = fit(model)
    with pytest.raises(RuntimeError, match="after the monitor"):
        fit(model, LipschitzMonitor(penalty=1.0, target=0.1), Fails())
    assert fit(model) == plain
