"""Inside `condensed` a model runs with constants, and its certificate is for them."""

# The annotations of TensorFlow and numpy do not cover what is passed and returned here.
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import CAPS, FEATURES, LENGTH, Case, randomize

import keras_lipattn as kl

# Decompositions, and the loops and branches in which they or iterations could hide.
FORBIDDEN = {"Svd", "SelfAdjointEigV2", "Cholesky", "Qr", "While", "StatelessWhile", "If"} | {
    "StatelessIf",
    "Case",
    "StatelessCase",
}


def _model(dtype="float32", cap="both"):
    inputs = keras.Input((LENGTH, FEATURES))
    attention = Case(cap=cap, dtype=dtype).layer()
    dense = kl.SpectralDense(3, spectral_norm=0.5, dtype=dtype)
    return keras.Model(inputs, dense(attention(inputs)))


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)).astype("float32")


def _operations(graph):
    nodes = list(graph.as_graph_def().node)
    for function in graph.as_graph_def().library.function:
        nodes += function.node_def
    return [node.op for node in nodes]


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}])
@pytest.mark.parametrize("cap", [None, *CAPS])
def test_graphs_hold_no_norms(cap, call):
    layer = Case(cap=cap, dtype="float32").layer()
    spec = tf.TensorSpec((None, LENGTH, FEATURES), "float32")

    def trace():
        return tf.function(lambda x: layer(x, **call)).get_concrete_function(spec).graph

    outside = _operations(trace())
    with kl.condensed(layer) as variables:
        graph = trace()
        inside = _operations(graph)
        captured = {id(v) for v in graph.variables}
    assert not FORBIDDEN & set(inside)
    # Two projections of the tokens and of their center, the distances, the values.
    assert sum("MatMul" in op for op in inside) <= 6
    # Outside the norms are found in loops.
    assert cap is None or {"While", "StatelessWhile"} & set(outside)
    expected = [*(v.value for v in variables), layer.output_bias.value]
    assert captured == {id(v) for v in expected}


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_nothing_is_left_behind(x, dtype):
    model = _model(dtype)
    weights = [np.copy(w) for w in model.weights]
    before = np.asarray(keras.ops.cast(model(x), "float32"))
    bounds = [layer.lipschitz() for layer in model.layers[1:]]
    with kl.condensed(model) as variables:
        assert len(variables) == 3
        assert [layer.lipschitz() for layer in model.layers[1:]] == bounds
    np.testing.assert_array_equal(keras.ops.cast(model(x), "float32"), before)
    for weight, old in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(weight, old)


def test_constants_stay_while_weights_move(x):
    model = _model()
    attention = model.layers[1]
    with kl.condensed(model):
        before, bound = np.asarray(model(x)), attention.lipschitz()
        for weight in attention.trainable_variables[:3]:
            # Another function, not one that a cap scales back to the same.
            weight.assign(5.0 * np.square(weight))
        np.testing.assert_array_equal(model(x), before)
        assert attention.lipschitz() == bound
    assert not np.allclose(model(x), before)


def test_predict_is_condensed_inside_and_current_afterwards(x):
    model = _model()
    model.compile("sgd", "mse")
    first = model.predict(x, verbose=0)
    outside = (model.predict_function, model.train_function)
    with kl.condensed(model):
        model.predict(x, verbose=0)
        assert model.predict_function is not outside[0]
    assert (model.predict_function, model.train_function) == outside
    np.testing.assert_array_equal(model.predict(x, verbose=0), first)
    for weight in model.trainable_variables:
        weight.assign(-2.0 * weight)
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), atol=1e-6)


def test_a_model_first_used_inside_is_not_stuck_there(x):
    model = _model()
    with kl.condensed(model):
        model.predict(x, verbose=0)
    for weight in model.trainable_variables:
        weight.assign(-2.0 * weight)
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), atol=1e-6)


def test_fit_goes_on_when_a_callback_condenses(x):
    model = _model()

    class Condense(keras.callbacks.Callback):
        seen = 0

        def on_train_batch_end(self, batch, logs=None):
            with kl.condensed(self.model):
                self.seen += bool(np.isfinite(self.model(x)).all())

    model.compile("sgd", "mse")
    callback = Condense()
    history = model.fit(x, np.zeros((2, LENGTH, 3)), epochs=3, verbose=0, callbacks=[callback])
    assert callback.seen == 3
    losses = history.history["loss"]
    assert losses[-1] < losses[0]


def test_an_error_inside_leaves_the_context(x):
    model = _model()
    before = np.asarray(model(x))
    with pytest.raises(RuntimeError, match="inside"):
        with kl.condensed(model):
            raise RuntimeError("inside")
    np.testing.assert_array_equal(model(x), before)
    randomize(model.layers[1], seed=9)
    assert not np.allclose(model(x), before)


def test_contexts_do_not_nest_and_need_weights(x):
    model = _model()
    with kl.condensed(model):
        inside = np.asarray(model(x))
        with pytest.raises(ValueError, match=r"one context at a time\. Received: layer '"):
            with kl.condensed(model.layers[1]):
                pass
        np.testing.assert_array_equal(model(x), inside)
    unbuilt = keras.Sequential([kl.SpectralDense(3), kl.L2MultiHeadAttention(2, 3)])
    with pytest.raises(ValueError, match=r"before condensing it\. Received: built=False"):
        with kl.condensed(unbuilt):
            pass


@pytest.mark.parametrize("cap", ["l2", "token", "linf"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("size", ["usual", "large"])
def test_caps_hold_for_the_constants(cap, dtype, size):
    # float16 ends at 65504, and loses digits below 6e-5, where the capped product then is.
    large = 100.0 if dtype == "mixed_float16" else 1e9
    layer = Case(cap=cap, dtype=dtype).layer(scale=1.0 if size == "usual" else large)
    visible = np.random.default_rng(0).random((LENGTH, LENGTH)) < 0.5
    for mask in ("full", "causal", "any", visible):
        outside = layer.lipschitz(norm=layer.lipschitz_norm, mask=mask).value
        with kl.condensed(layer):
            inside = layer.lipschitz(norm=layer.lipschitz_norm, mask=mask).value
        assert inside == outside
        assert inside <= layer.lipschitz_bound
