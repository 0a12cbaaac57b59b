"""The penalty in the training loss, and its absence everywhere else."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers.monitor_models import KINDS, compiled, data, dense, fit, weights, without_loss

import keras_lipattn as kl
from keras_lipattn.callbacks import LipschitzMonitor
from keras_lipattn.layers import lipschitz_layers


def model_of_penalty(kind="sequential", **kwargs):
    """A model whose only loss is the penalty."""
    return compiled(KINDS[kind](), loss=without_loss, **kwargs)


def penalty_now(model, coefficient, target):
    """The penalty, from exact norms."""
    bounds = [layer.lipschitz().value for layer in lipschitz_layers(model)]
    return coefficient * sum(max(0.0, math.log(bound / target)) for bound in bounds)


class Interrupt(keras.callbacks.Callback):
    """Ends a `fit` by an exception at a given moment."""

    def __init__(self, moment: str, error: type[BaseException] = KeyboardInterrupt):
        super().__init__()
        self.error = error
        setattr(self, moment, self.interrupt)

    def interrupt(self, index, logs=None):
        if index == 1:
            raise self.error


# The penalty ------------------------------------------------------------------------------------


def test_gradient_is_that_of_the_logarithm_of_the_norm():
    model = compiled(
        keras.Sequential([keras.Input((6,)), dense(4, use_bias=False)]),
        learning_rate=1.0,
        loss=without_loss,
    )
    (layer,) = lipschitz_layers(model)
    kernel = layer.kernel.numpy().astype(np.float64)
    left, values, right = np.linalg.svd(kernel)
    monitor = LipschitzMonitor(penalty=0.25, target=0.01)
    model.fit(np.ones((4, 6), "float32"), np.zeros(4), verbose=0, callbacks=[monitor])
    expected = kernel - 0.25 * np.outer(left[:, 0], right[0]) / values[0]
    # Thirty power steps leave (second value / first)**60 of the wrong direction.
    assert (values[1] / values[0]) ** 60 < 1e-3
    np.testing.assert_allclose(layer.kernel.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["functional", "nested", "shared"])
def test_loss_is_the_hinge_on_the_logarithms_of_the_bounds(kind):
    model = model_of_penalty(kind, learning_rate=0.0)
    loss = fit(model, LipschitzMonitor(penalty=0.5, target=0.2))["loss"][0]
    if kind == "shared":
        # Called twice, it is penalized twice, with the bounds for both masks.
        attention, head = model.get_layer("attention"), model.get_layer("head")
        bounds = [attention.lipschitz(mask=mask).value for mask in ("full", "causal")]
        bounds.append(head.lipschitz().value)
        expected = 0.5 * sum(math.log(bound / 0.2) for bound in bounds)
    else:
        expected = penalty_now(model, 0.5, 0.2)
    # The formula in the graph uses one scaling per head, the certificate the best of several.
    assert loss == pytest.approx(expected, rel=0.02)
    assert loss > 0.1


def test_bounds_below_their_targets_are_not_penalized():
    model = model_of_penalty(learning_rate=1.0)
    before = weights(model)
    assert fit(model, LipschitzMonitor(penalty=1.0, target=100.0))["loss"] == [0.0]
    np.testing.assert_array_equal(weights(model), before)


@pytest.mark.parametrize("name", ["total", "encoder.a/dense"])
def test_layers_without_target_are_not_penalized(name):
    model = model_of_penalty("nested", learning_rate=0.5)
    before = [variable.numpy() for variable in model.trainable_variables]
    fit(model, LipschitzMonitor(penalty=1.0, target={name: 0.1}))
    moved = [
        variable
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if not np.array_equal(variable.numpy(), old)
    ]
    layer = model
    for part in name.split("/"):
        layer = layer.get_layer(part)
    assert [id(variable) for variable in moved] == [id(layer.kernel)]


def test_targets_by_name_apply_to_all_layers_of_that_name_but_paths_take_precedence():
    model = model_of_penalty("nested")
    fit(model, LipschitzMonitor(penalty=0.1, target={"dense": 0.5, "encoder-b/dense": 0.25}))
    by_encoder = {
        name: float(model.get_layer(name).get_layer("dense").penalty_log_target.numpy())
        for name in ("encoder.a", "encoder-b")
    }
    assert by_encoder == pytest.approx({"encoder.a": math.log(0.5), "encoder-b": math.log(0.25)})


def trained_by_penalty(**how):
    keras.utils.set_random_seed(17)
    model = model_of_penalty("functional", **how)
    loss = fit(model, LipschitzMonitor(penalty=0.5, target=0.1), epochs=2)["loss"]
    return loss, weights(model)


@pytest.fixture(scope="module")
def trained_plainly():
    return trained_by_penalty()


@pytest.mark.parametrize("how", ["jit_compile", "run_eagerly", "steps_per_execution"])
def test_penalty_does_not_depend_on_how_steps_run(how, trained_plainly):
    loss, vector = trained_by_penalty(**{how: 2 if how == "steps_per_execution" else True})
    # Float32, in another order.
    np.testing.assert_allclose(loss, trained_plainly[0], rtol=1e-5)
    np.testing.assert_allclose(vector, trained_plainly[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_penalty_shrinks_bounds_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = KINDS["functional"]()
    finally:
        keras.config.set_dtype_policy("float32")
    model = compiled(model, learning_rate=0.3, loss=without_loss)
    monitor = LipschitzMonitor(penalty=1.0, target=0.1)
    loss = fit(model, monitor, epochs=2)["loss"]
    assert np.isfinite(loss).all() and loss[-1] < loss[0]
    totals = monitor.history["lipschitz_total"]
    assert np.isfinite(totals).all() and totals[-1] < totals[0]


def test_penalized_bounds_go_under_their_targets_while_the_task_is_learned():
    random = np.random.default_rng(5)
    x = random.standard_normal((256, 5, 6)).astype("float32")
    y = (x.mean(axis=(1, 2)) > 0).astype("int64")
    x += 0.5 * (2 * y[:, None, None] - 1).astype("float32")
    model = KINDS["functional"]()
    rate: Any = keras.optimizers.schedules.CosineDecay(0.02, 16 * 8)
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    target = {"attention": 0.5, "head": 1.0}
    before = {name: model.get_layer(name).lipschitz().value for name in target}
    assert all(before[name] > target[name] for name in target)
    # Running norms lag behind a little, so the targets leave a margin of 5 %.
    monitor = LipschitzMonitor(
        penalty=1.0, target={name: 0.95 * value for name, value in target.items()}
    )
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0, callbacks=[monitor]).history
    for name, value in target.items():
        assert history[f"lipschitz_{name}"][-1] <= value
    assert history["accuracy"][-1] > 0.9


# Schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        lambda epoch: 0.25 * (epoch + 1),
        lambda epoch, coefficient: coefficient + 0.25,
        keras.optimizers.schedules.PolynomialDecay(0.25, 3, 1.0),
    ],
    ids=["epoch", "epoch and coefficient", "of keras"],
)
def test_schedule_sets_the_coefficient_of_every_epoch(schedule):
    model = model_of_penalty(learning_rate=0.0)
    monitor = LipschitzMonitor(penalty=schedule, target=0.2)
    loss = np.array(fit(model, monitor, epochs=4)["loss"])
    np.testing.assert_allclose(loss / loss[0], [1, 2, 3, 4], rtol=1e-3)


def test_coefficient_is_a_weight_and_may_change_between_epochs():
    model = model_of_penalty(learning_rate=0.0)
    monitor = LipschitzMonitor(penalty=0.1, target=0.2)

    def change(epoch, logs):
        monitor.penalty = 0.1 * (epoch + 2)

    changing = keras.callbacks.LambdaCallback(on_epoch_end=change)
    loss = fit(model, monitor, changing, epochs=3)["loss"]
    np.testing.assert_allclose(np.array(loss) / loss[0], [1, 2, 3], rtol=1e-3)
    assert float(model.get_layer("head").penalty_coefficient.numpy()) == pytest.approx(0.3)


def test_second_fit_uses_a_changed_coefficient():
    model = model_of_penalty(learning_rate=0.0)
    first = fit(model, LipschitzMonitor(penalty=0.1, target=0.2))["loss"][0]
    second = fit(model, LipschitzMonitor(penalty=0.3, target=0.2))["loss"][0]
    assert second == pytest.approx(3 * first, rel=1e-3)


def test_first_fit_without_monitor_does_not_switch_the_penalty_off_in_the_second():
    model = model_of_penalty(learning_rate=0.0)
    assert fit(model)["loss"] == [0.0]
    assert fit(model, LipschitzMonitor(penalty=0.1, target=0.2))["loss"][0] > 0.01


# Without the penalty ------------------------------------------------------------------------------


def test_validation_and_evaluation_are_free_of_the_penalty():
    model = model_of_penalty(learning_rate=0.01)
    evaluated = []
    during = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: evaluated.append(model.evaluate(*data(), verbose=0))
    )
    # Traced before, during and after the penalty.
    evaluated.append(model.evaluate(*data(), verbose=0))
    history = fit(
        model,
        LipschitzMonitor(penalty=1.0, target=0.2),
        during,
        epochs=2,
        validation_data=data(),
    )
    evaluated.append(model.evaluate(*data(), verbose=0))
    assert min(history["loss"]) > 0.1
    assert history["val_loss"] == [0.0, 0.0]
    assert evaluated == [0.0] * 4


def test_validation_is_free_of_the_penalty_of_a_layer_that_always_trains():
    inputs = keras.Input((5, 6))
    x = keras.layers.GlobalAveragePooling1D()(inputs)
    # As for dropout at inference.
    outputs = dense(3)(x, training=True)
    model = compiled(keras.Model(inputs, outputs), loss=without_loss)
    history = fit(model, LipschitzMonitor(penalty=1.0, target=0.1), validation_data=data())
    assert history["loss"][0] > 0.1
    assert history["val_loss"] == [0.0]


@pytest.mark.parametrize(
    "moment",
    [
        "on_train_batch_begin",
        "on_epoch_begin",
        "on_epoch_end",
        "on_test_batch_end",
    ],
)
def test_an_interrupted_fit_leaves_no_penalty_behind(moment):
    model = model_of_penalty(learning_rate=0.5)
    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            LipschitzMonitor(penalty=1.0, target=0.2),
            Interrupt(moment),
            epochs=3,
            validation_data=data(),
            validation_batch_size=2,
        )
    before = weights(model)
    assert fit(model)["loss"] == [0.0]
    np.testing.assert_array_equal(weights(model), before)


@pytest.mark.parametrize("interrupt", [True, False])
def test_train_on_batch_after_a_fit_is_free_of_the_penalty(interrupt):
    model = model_of_penalty(learning_rate=0.5)
    callbacks = [LipschitzMonitor(penalty=1.0, target=0.2)]
    if interrupt:
        with pytest.raises(RuntimeError):
            fit(model, *callbacks, Interrupt("on_train_batch_end", RuntimeError))
    else:
        fit(model, *callbacks)
    before = weights(model)
    assert model.train_on_batch(*data()) == 0.0
    np.testing.assert_array_equal(weights(model), before)


def test_a_failing_step_leaves_no_penalty_behind():
    model = KINDS["sequential"]()
    fails = [True]

    def failing(y, outputs):
        if fails:
            raise RuntimeError("in the middle of a step")
        return without_loss(y, outputs)

    model.compile("sgd", failing, run_eagerly=True)
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(model, LipschitzMonitor(penalty=1.0, target=0.2))
    fails.clear()
    assert all(layer.tracking is None for layer in lipschitz_layers(model))
    model(data()[0], training=True)
    assert model.losses == []
    assert fit(model)["loss"] == [0.0]


def test_an_interrupted_fit_can_be_continued():
    model = model_of_penalty(learning_rate=0.0)
    monitor = LipschitzMonitor(penalty=1.0, target=0.2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor, Interrupt("on_epoch_end"), epochs=3)
    loss = fit(model, monitor, initial_epoch=1, epochs=3)["loss"]
    assert len(loss) == 2 and min(loss) > 0.1


def test_a_new_train_function_during_fit_keeps_the_penalty():
    model = model_of_penalty(learning_rate=0.0)

    def rebuild(epoch, logs):
        # As after freezing layers.
        model.make_train_function(force=True)

    loss = fit(
        model,
        LipschitzMonitor(penalty=1.0, target=0.2),
        keras.callbacks.LambdaCallback(on_epoch_begin=rebuild),
        epochs=3,
    )["loss"]
    np.testing.assert_allclose(loss, loss[0], rtol=1e-3)
    assert loss[0] > 0.1


def test_a_trained_model_is_saved_and_loaded_without_penalty(tmp_path):
    model = model_of_penalty()
    fit(model, LipschitzMonitor(penalty=1.0, target=0.2))
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"without_loss": without_loss}
    )
    np.testing.assert_array_equal(weights(loaded), weights(model))
    assert fit(loaded)["loss"] == [0.0]
    assert kl.certify(loaded).total == kl.certify(model).total
