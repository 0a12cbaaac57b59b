"""A model created outside of the strategy that runs it is an error with a message."""

import keras
import pytest
import tensorflow as tf
from helpers import monitor_models

import keras_lipattn as kl

MESSAGE = (
    "has variables that were created outside of the strategy it runs under: build the model "
    r"within `strategy.scope\(\)`. Received: variable '.*' under MirroredStrategy"
)


@pytest.fixture
def strategy(two_cpus):
    return tf.distribute.MirroredStrategy(two_cpus)


@pytest.mark.parametrize("make_model", [monitor_models.sequential, monitor_models.functional])
def test_fit_under_a_strategy_needs_a_model_created_in_its_scope(make_model, strategy):
    model = monitor_models.compiled(make_model())
    before = monitor_models.weights(model)
    with strategy.scope(), pytest.raises(ValueError, match=f"Layer '.*' {MESSAGE}"):
        monitor_models.fit(model)
    assert (monitor_models.weights(model) == before).all()
    # The model can still be trained outside.
    monitor_models.fit(model, kl.LipschitzMonitor())


@pytest.mark.parametrize("penalty", [None, 0.1])
def test_a_monitor_raises_before_the_first_step(penalty, strategy):
    model = monitor_models.compiled(monitor_models.functional())
    with strategy.scope(), pytest.raises(ValueError, match=f"Model 'functional' {MESSAGE}"):
        monitor_models.fit(model, kl.LipschitzMonitor(penalty=penalty))
    monitor_models.fit(model, kl.LipschitzMonitor(penalty=penalty))


def test_the_monitor_finds_a_keras_layer_created_elsewhere(strategy):
    foreign = keras.layers.Dense(monitor_models.FEATURES, name="foreign")
    foreign.build((None, monitor_models.FEATURES))
    with strategy.scope():
        model = monitor_models.compiled(
            keras.Sequential(
                [
                    keras.Input((5, monitor_models.FEATURES)),
                    foreign,
                    keras.layers.GlobalAveragePooling1D(),
                    monitor_models.dense(3),
                ]
            )
        )
    with pytest.raises(ValueError, match=MESSAGE):
        monitor_models.fit(model, kl.LipschitzMonitor())


def test_inference_and_the_certificate_need_no_strategy(strategy):
    model = monitor_models.functional()
    x, _ = monitor_models.data()
    alone = model.predict(x, verbose=0)
    with strategy.scope():
        assert (model(x).numpy() == model(x).numpy()).all()
        model.get_layer("attention").condense()
        assert abs(model.predict(x, verbose=0) - alone).max() < 1e-5
