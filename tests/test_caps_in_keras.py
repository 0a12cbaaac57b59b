"""Capped layers inside of ordinary Keras code: blocks without `build`, reloading, exports."""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import keras_lipattn as kl

LENGTH, FEATURES = 6, 8


@keras.saving.register_keras_serializable(package="caps_in_keras")
class Block(keras.layers.Layer):
    """Sublayers made in `__init__` and no `build`, like most public examples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = kl.L2MultiHeadAttention(2, 4, lipschitz_bound=0.3)
        self.cosine = kl.ScaledCosineAttention(2, 4, spectral_norm=0.5)
        self.dense = kl.SpectralDense(FEATURES, spectral_norm=0.5)

    def call(self, inputs, training=None):
        x = inputs + self.attention(inputs, training=training)
        x = x + self.cosine(x, training=training)
        return x + self.dense(x, training=training)


@keras.saving.register_keras_serializable(package="caps_in_keras")
class Nested(keras.layers.Layer):
    """Such blocks two deep."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = Block()
        self.second = Block()

    def call(self, inputs, training=None):
        return self.second(self.first(inputs, training=training), training=training)


@keras.saving.register_keras_serializable(package="caps_in_keras")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Nested()

    def call(self, inputs, training=None):
        return self.block(inputs, training=training)


def _functional(layer):
    inputs = keras.Input((LENGTH, FEATURES))
    return keras.Model(inputs, layer(inputs))


MODELS = {
    "functional": lambda: _functional(Block()),
    "nested": lambda: _functional(Nested()),
    "subclassed": Subclassed,
}

# Caps that are at work for the weights of `_trained`.
LAYERS = {
    "l2": lambda: kl.L2MultiHeadAttention(2, 4, lipschitz_bound=0.1),
    "token": lambda: kl.L2MultiHeadAttention(2, 4, lipschitz_bound=0.1, lipschitz_norm="token"),
    "linf": lambda: kl.L2MultiHeadAttention(2, 4, lipschitz_bound=0.1, lipschitz_norm="linf"),
    "spectral": lambda: kl.L2MultiHeadAttention(2, 4, spectral_norm=0.2),
    "both": lambda: kl.L2MultiHeadAttention(2, 4, spectral_norm=0.2, lipschitz_bound=0.001),
    "relative": lambda: kl.L2MultiHeadAttention(2, 4, lipschitz_bound=0.1, max_relative_position=2),
    "cosine": lambda: kl.ScaledCosineAttention(2, 4, lipschitz_bound=0.1),
    "cosine token": lambda: kl.ScaledCosineAttention(
        2, 4, lipschitz_bound=0.1, lipschitz_norm="token"
    ),
    "cosine spectral": lambda: kl.ScaledCosineAttention(2, 4, spectral_norm=0.2),
    "dense": lambda: kl.SpectralDense(FEATURES, spectral_norm=0.2),
    "orthogonal": lambda: kl.SpectralDense(
        FEATURES, spectral_norm=0.2, kernel_initializer="orthogonal"
    ),
    "orthonormal": lambda: kl.OrthogonalDense(FEATURES),
    "invertible": lambda: kl.InvertibleResidual(_branch(), coefficient=0.5),
    "continuous": lambda: kl.ContinuousDepth(_branch(), 0.5, steps=2),
    "block": Block,
}


def _branch():
    return keras.Sequential(
        [
            kl.L2MultiHeadAttention(2, 4, spectral_norm=0.5),
            kl.SpectralDense(FEATURES, spectral_norm=0.2),
        ]
    )


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, LENGTH, FEATURES)).astype("float32")


def _trained(layer, x):
    """A model whose weights moved, which remembers exact norms as a monitor leaves them."""
    model = _functional(layer)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, 3.0 * x, epochs=2, verbose=0)
    for each in model._flatten_layers():
        if hasattr(each, "condense"):
            each.condense()
    return model


def _assert_same(values, others):
    # An allowance of 1e-6 covers every remembered norm, the same for all ways to find it.
    np.testing.assert_allclose(values, others, rtol=0, atol=1e-6 * np.abs(others).max())


# Blocks without `build` ----------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_block_without_build_is_built_and_capped(model, x):
    model = MODELS[model]()
    model(x)
    for layer in model._flatten_layers():
        if isinstance(layer, kl.L2MultiHeadAttention):
            assert layer.lipschitz().value <= 0.3
            assert layer.caps_are_exact()


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_block_without_build_is_trained(model, jit_compile, monitored, x):
    model = MODELS[model]()
    model.compile("adam", "mse", jit_compile=jit_compile)
    history = model.fit(
        x,
        x,
        batch_size=4,
        epochs=2,
        verbose=0,
        validation_data=(x, x),
        callbacks=[kl.LipschitzMonitor()] if monitored else [],
    ).history
    assert np.isfinite(history["val_loss"]).all()
    assert len(history["loss"]) == 2
    assert ("lipschitz_total" in history) == monitored


# Keras warns of any layer without `build` that it reloads, whatever its sublayers.
@pytest.mark.filterwarnings("ignore:`build..` was called on layer:UserWarning")
@pytest.mark.parametrize("model", MODELS)
def test_a_block_without_build_is_reloaded(model, x, tmp_path):
    model = MODELS[model]()
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0, callbacks=[kl.LipschitzMonitor()])
    outputs = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    _assert_same(again.predict(x, verbose=0), outputs)
    again.fit(x, x, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    _assert_same(again.predict(x, verbose=0), outputs)


def test_a_block_without_build_is_cloned(x):
    model = _functional(Nested())
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    _assert_same(clone.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_block_without_build_is_trained_by_replicas(x, two_cpus):
    with tf.distribute.MirroredStrategy(two_cpus).scope():
        model = _functional(Nested())
        model.compile("adam", "mse")
    model.fit(x, x, batch_size=4, verbose=0)
    model.predict(x, verbose=0)


def test_a_stateless_call_writes_no_memory(x):
    layer = kl.L2MultiHeadAttention(2, 4, lipschitz_bound=0.1)
    outputs = np.asarray(layer(x))
    kept = [np.copy(snapshot) for snapshot in layer._cache._snapshots]
    doubled = [2.0 * weight for weight in layer.trainable_variables]
    found, _ = layer.stateless_call(doubled, layer.non_trainable_variables, x)
    for snapshot, before in zip(layer._cache._snapshots, kept, strict=True):
        np.testing.assert_array_equal(snapshot, before)
    assert not np.allclose(found, outputs)
    for weight, value in zip(layer.trainable_variables, doubled, strict=True):
        weight.assign(value)
    _assert_same(found, layer(x))


# The same weights, the same caps -------------------------------------------------


@pytest.mark.filterwarnings("ignore:`build..` was called on layer:UserWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_reloading_changes_no_output(layer, x, tmp_path):
    make = LAYERS[layer]
    model = _trained(make(), x)
    outputs = model.predict(x, verbose=0)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    _assert_same(loaded.predict(x, verbose=0), outputs)

    model.save_weights(tmp_path / "model.weights.h5")
    with_file, with_list = _functional(make()), _functional(make())
    with_file.load_weights(tmp_path / "model.weights.h5")
    _assert_same(with_file.predict(x, verbose=0), outputs)
    with_list.set_weights(model.get_weights())
    _assert_same(with_list(x), outputs)


# Exports of Keras ----------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_keras_exports_a_saved_model(layer, x, tmp_path):
    model = _trained(LAYERS[layer](), x)
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    served = loaded.serve(x)
    # The order of sums differs between two graphs: 1e-5, as everywhere in float32.
    outputs = model.predict(x, verbose=0)
    np.testing.assert_allclose(served, outputs, rtol=0, atol=1e-5 * np.abs(outputs).max())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_frozen_graph_has_constant_caps(layer, x):
    """What an export to ONNX starts from: variables as constants, nothing to decide or to write."""
    from keras.src.export.onnx import get_concrete_fn

    model = _trained(LAYERS[layer](), x)
    signature = [tf.TensorSpec((None, LENGTH, FEATURES), "float32")]
    function = get_concrete_fn(model, signature).get_concrete_function()
    frozen = convert_variables_to_constants_v2(function)
    graph = frozen.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    loops = {"While", "StatelessWhile"} if layer != "continuous" else set()
    forbidden = {"If", "StatelessIf", "AssignVariableOp"} | loops
    assert not forbidden & {node.op for node in nodes}
    outputs = model.predict(x, verbose=0)
    (found,) = frozen(tf.constant(x))
    np.testing.assert_allclose(found, outputs, rtol=0, atol=1e-5 * np.abs(outputs).max())


def test_broken_weights_are_frozen_as_they_are(x):
    from keras.src.export.onnx import get_concrete_fn

    model = _functional(kl.SpectralDense(FEATURES, spectral_norm=0.2))
    kernel = model.layers[1].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    function = get_concrete_fn(model, [tf.TensorSpec((None, LENGTH, FEATURES), "float32")])
    assert np.isnan(function(x)).all()


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tf2onnx", "onnxruntime")),
    reason="needs tf2onnx and onnxruntime",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", LAYERS)
def test_keras_exports_to_onnx(layer, x, tmp_path):
    import onnxruntime  # pyright: ignore[reportMissingImports]

    model = _trained(LAYERS[layer](), x)
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    outputs = model.predict(x, verbose=0)
    np.testing.assert_allclose(found, outputs, rtol=0, atol=1e-5 * np.abs(outputs).max())
