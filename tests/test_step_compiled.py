"""A step is one program of XLA with static shapes and nothing of the host in it: fit for a TPU."""

import contextlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import monitor_models

import keras_lipattn as kl
from keras_lipattn.layers import Tracking, lipschitz_layers

BATCH = 4
# Runs Python, prints, handles text, sizes its output as it goes, or decomposes a matrix.
UNFIT = re.compile(
    r"PyFunc|Print|Str(ing|.*Format)|Where$|Unique|DynamicPartition|Host|Outfeed|Infeed|Svd|"
    r"SelfAdjointEig|Cholesky|Qr$"
)


def masked():
    """Padding, a window, dropout, a center."""
    inputs = keras.Input((monitor_models.TOKENS, monitor_models.FEATURES))
    x = keras.layers.Masking()(inputs)
    x = monitor_models.attention(sliding_window=2, dropout=0.1, lipschitz_bound=0.5)(x)
    x = kl.CenterNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, monitor_models.dense(monitor_models.CLASSES, name="head")(x))


def asking_the_host():
    """What must be found out: a layer that calls Python."""
    inputs = keras.Input((monitor_models.TOKENS, monitor_models.FEATURES))
    x = keras.layers.GlobalAveragePooling1D()(inputs)
    x = keras.layers.Lambda(
        lambda x: tf.ensure_shape(tf.numpy_function(np.tanh, [x], tf.float32), x.shape)
    )(x)
    return keras.Model(inputs, monitor_models.dense(monitor_models.CLASSES)(x))


@contextlib.contextmanager
def tracked(model):
    """The model as in a training step with a penalty."""
    layers = lipschitz_layers(model)
    for layer in layers:
        layer.tracking = Tracking(penalize=True)
    try:
        yield
    finally:
        for layer in layers:
            layer.tracking = None


def _step(make_model, name):
    """A step with all its state made, as a function for XLA, and what to call it with."""
    model = monitor_models.compiled(make_model(), jit_compile=True)
    model.optimizer.build(model.trainable_variables)
    x, y = monitor_models.data(BATCH)
    data = (tf.constant(x), tf.constant(y))
    step = tf.function(getattr(model, name), jit_compile=True)
    with tracked(model):
        return step, step.get_concrete_function(data), data


def _operations(function):
    definition = function.graph.as_graph_def()
    inner = [node for inner in definition.library.function for node in inner.node_def]
    return {node.op for node in [*definition.node, *inner]}


@pytest.mark.parametrize("name", ["train_step", "test_step"])
@pytest.mark.parametrize("make_model", [monitor_models.capped, monitor_models.shared, masked])
def test_a_step_is_one_program_of_static_shapes_without_the_host(make_model, name):
    step, function, data = _step(make_model, name)
    operations = _operations(function)
    assert {"BatchMatMulV2", "Softmax"} <= operations
    assert not {operation for operation in operations if UNFIT.search(operation)}
    program = step.experimental_get_compiler_ir(data)(stage="hlo")
    assert "ENTRY" in program
    # A bounded dynamic size is written "<=4"; what XLA leaves to others is a custom call.
    assert not re.search(r"\[[^]]*<=", program)
    assert "custom-call" not in program


def test_a_layer_that_asks_the_host_is_found_out():
    _, function, _ = _step(asking_the_host, "train_step")
    assert {operation for operation in _operations(function) if UNFIT.search(operation)}


def test_training_compiled_by_xla_is_the_same():
    results = {}
    for jit_compile in (False, True):
        keras.utils.set_random_seed(3)
        model = monitor_models.compiled(
            monitor_models.capped(), learning_rate=0.05, jit_compile=jit_compile
        )
        monitor = kl.LipschitzMonitor(penalty=0.2, target=0.1, running_freq=1)
        history = monitor_models.fit(model, monitor, epochs=2)
        assert model.jit_compile is jit_compile
        results[jit_compile] = {"weights": monitor_models.weights(model), **history}
    assert results[True].keys() == results[False].keys()
    for key, values in results[False].items():
        # Float32 in another order.
        np.testing.assert_allclose(results[True][key], values, rtol=1e-5, atol=1e-6, err_msg=key)
