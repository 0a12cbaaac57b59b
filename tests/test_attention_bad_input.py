"""Bad input ends in an error that says what was received, or in a result that says why."""

import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import FEATURES, LENGTH, Case

import keras_lipattn as kl

NORMS = ("l2", "token", "linf")


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)).astype("float32")


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 0},
        {"num_heads": -1},
        {"num_heads": 2.0},
        {"num_heads": True},
        {"num_heads": None},
        {"key_dim": 0},
        {"value_dim": 0},
        {"value_dim": 1.5},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"dropout": "much"},
        {"output_shape": 0},
        {"output_shape": (2, -1)},
        {"output_shape": 2.5},
        {"output_shape": "ab"},
        {"attention_axes": "ab"},
        {"attention_axes": 1.0},
        {"sliding_window": 0},
        {"sliding_window": 2.0},
        {"spectral_norm": 0.0},
        {"spectral_norm": -1.0},
        {"spectral_norm": math.inf},
        {"spectral_norm": math.nan},
        {"spectral_norm": "1"},
        {"lipschitz_bound": 0},
        {"lipschitz_bound": math.nan},
        {"lipschitz_bound": True},
        {"lipschitz_norm": "l1"},
        {"lipschitz_norm": 2},
        {"lipschitz_norm": ["l2"]},
        {"max_sequence_length": 0},
        {"max_sequence_length": 4.0},
        {"use_gate": True},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named_with_what_was_received(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"`{name}` .*Received: {name}=") as raised:
        kl.L2MultiHeadAttention(**{"num_heads": 2, "key_dim": 3, **arguments})
    shown = value[-1] if isinstance(value, tuple) else value
    assert str(shown) in str(raised.value)


def test_the_gate_is_refused_with_its_reason_and_its_absence_accepted():
    with pytest.raises(ValueError, match=r"gate .* has no Lipschitz bound"):
        kl.L2MultiHeadAttention(2, 3, use_gate=True)
    kl.L2MultiHeadAttention(2, 3, use_gate=False)
    with pytest.raises(ValueError, match="no_such_argument"):
        kl.L2MultiHeadAttention(2, 3, no_such_argument=1)


@pytest.mark.parametrize("shape", [(), (3,), (4, 3)])
def test_queries_need_three_axes(shape):
    with pytest.raises(ValueError, match=r"at least three axes.*Received: query_shape=\(.*\)$"):
        kl.L2MultiHeadAttention(2, 3).build(shape)
    if shape:
        with pytest.raises(ValueError, match="at least three axes"):
            kl.L2MultiHeadAttention(2, 3)(np.zeros(shape))


@pytest.mark.parametrize("features", [None, 0])
def test_features_must_be_known(features):
    shape = (None, 4, features)
    with pytest.raises(ValueError, match=r"last axis .* static.*Received: query_shape=\(None, 4"):
        kl.L2MultiHeadAttention(2, 3).build(shape)


@pytest.mark.parametrize("axes", [0, 2, -1, 5, -4, (1, 1), (1, -2), (0, 1)])
def test_attention_axes_lie_between_batch_and_features(axes, x):
    with pytest.raises(ValueError, match=r"`attention_axes`.*Received: attention_axes=\("):
        kl.L2MultiHeadAttention(2, 3, attention_axes=axes)(x)


def test_a_built_layer_refuses_other_ranks_and_features(x):
    layer = kl.L2MultiHeadAttention(2, 3)
    layer(x)
    with pytest.raises(ValueError, match=r"expected axis -1 .* value 4, .*\(2, 5, 3\)"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match=r"expected ndim=3, found ndim=4"):
        layer(x[:, None])
    with pytest.raises(ValueError, match=r"expected ndim=3, found ndim=2"):
        layer(x[0])


WRONG_PAIRS = [(5, 4), (4, 5), (6, 6), (5,), (2, 5, 4), (3, 5, 5), (2, 3, 5, 5), (1, 1, 1, 5, 5)]


@pytest.mark.parametrize("shape", WRONG_PAIRS, ids=str)
@pytest.mark.parametrize("kind", [np.ones, tf.ones])
def test_masks_of_pairs_must_be_square_and_fit(shape, kind, x):
    mask = kind(shape, "bool" if kind is np.ones else tf.bool)
    layer = kl.L2MultiHeadAttention(2, 3)
    with pytest.raises(ValueError, match=r"`attention_mask` must .*Received: "):
        layer(x, attention_mask=mask)


@pytest.mark.parametrize("name", ["query_mask", "value_mask", "key_mask"])
@pytest.mark.parametrize("shape", [(5,), (2, 4), (3, 5), (2, 5, 1), (2,)], ids=str)
def test_masks_of_tokens_must_fit(name, shape, x):
    layer = kl.L2MultiHeadAttention(2, 3)
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape.*Received: {name} of"):
        layer(x, **{name: np.ones(shape, bool)})


def test_masks_are_checked_when_a_graph_is_made():
    layer = kl.L2MultiHeadAttention(2, 3)
    inputs = keras.Input((LENGTH, FEATURES))
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape"):
        layer(inputs, attention_mask=keras.Input((4, 4), dtype="bool"))
    with pytest.raises(ValueError, match=r"`key_mask` must have the shape"):
        layer(inputs, key_mask=keras.Input((4,), dtype="bool"))
    layer(inputs, attention_mask=keras.Input((LENGTH, LENGTH), dtype="bool"))


# Lengths ---------------------------------------------------------------------


def test_a_cap_needs_a_length():
    layer = kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)
    with pytest.raises(ValueError, match=r"Received: query_shape=\(None, None, 4\)"):
        layer(keras.Input((None, FEATURES)))
    with pytest.raises(ValueError, match=r"not empty\. Received: query_shape=\(2, 0, 4\)"):
        kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)(np.zeros((2, 0, FEATURES)))
    several = kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)
    with pytest.raises(ValueError, match=r"Received: query_shape=\(None, 3, None, 4\)"):
        several(keras.Input((3, None, FEATURES)))


def test_a_longer_static_input_is_refused_eagerly_and_in_graphs(x):
    layer = kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0)
    layer(x[:, :3])
    assert layer.max_sequence_length == 3
    message = r"at most 3 tokens .*Received: an input of 5 tokens"
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=message):
        layer(keras.Input((5, FEATURES)))
    with pytest.raises(ValueError, match=message):
        tf.function(layer)(x)
    with pytest.raises(ValueError, match=message):
        kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0, max_sequence_length=3)(x)
    # Without a cap the length is no limit, but the certificate speaks of the longer one.
    free = kl.L2MultiHeadAttention(2, 3, max_sequence_length=3)
    free(x)
    assert free.lipschitz().value == free.lipschitz(5).value > free.lipschitz(3).value


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_longer_dynamic_input_gives_nan_and_no_number(x, jit_compile):
    layer = kl.L2MultiHeadAttention(2, 3, lipschitz_bound=1.0, max_sequence_length=3)
    layer.build((None, None, FEATURES))
    signature = [tf.TensorSpec((2, None, FEATURES))]
    graph = tf.function(layer, input_signature=signature, jit_compile=jit_compile)
    assert np.isnan(graph(x)).all()
    assert np.isfinite(graph(x[:, :3])).all()
    assert np.isfinite(graph(x[:, :1])).all()


# Certificates ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1"}, r"`norm` must be one of .*Received: norm='l1'"),
        ({"norm": None}, r"Received: norm=None"),
        ({"norm": ["l2"]}, r"Received: norm=\['l2'\]"),
        ({"sequence_length": 0}, r"Received: sequence_length=0"),
        ({"sequence_length": 2.5}, r"Received: sequence_length=2.5"),
        ({"mask": "diagonal"}, r"Received: mask='diagonal'"),
        ({"mask": np.ones((3, 4))}, r"must be square.*Received: shape=\(3, 4\)"),
        ({"mask": np.ones(3)}, r"Received: shape=\(3,\)"),
        ({"mask": None}, r"Received: shape=\(\)"),
    ],
    ids=str,
)
def test_questions_out_of_range_are_refused(arguments, message, x):
    layer = kl.L2MultiHeadAttention(2, 3)
    layer(x)
    with pytest.raises(ValueError, match=message):
        layer.lipschitz(**arguments)


@pytest.mark.parametrize(
    "make", [lambda: kl.L2MultiHeadAttention(2, 3), lambda: kl.SpectralDense(3)]
)
def test_an_unbuilt_layer_has_no_constant(make):
    layer = make()
    for ask in (layer.lipschitz, layer.condense, layer.warm_up):
        with pytest.raises(ValueError, match=r"no weights yet: build it, .*Received: built=False"):
            ask()


@pytest.mark.parametrize("norm", NORMS)
def test_an_unknown_length_is_infinite_with_a_reason(norm):
    layer = kl.L2MultiHeadAttention(2, 3)
    layer.build((None, None, FEATURES))
    bound = layer.lipschitz(norm=norm)
    assert bound.value == math.inf
    assert "sequence length" in bound.reason
    assert math.isfinite(layer.lipschitz(7, norm=norm).value)
    assert math.isfinite(layer.lipschitz(norm=norm, mask=np.eye(4)).value)
    empty = kl.L2MultiHeadAttention(2, 3)
    empty.build((None, 0, FEATURES))
    assert empty.lipschitz(norm=norm).value == math.inf


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("cap", [None, "spectral", "linf", "both"])
def test_broken_weights_have_no_constant_and_are_not_hidden(cap, value):
    case = Case(cap=cap, dtype="float32")
    for index in range(4):
        layer = case.layer()
        weight = layer.trainable_variables[index]
        broken = np.copy(weight)
        broken.flat[1] = value
        weight.assign(broken)
        for remembered in (False, True):
            if remembered:
                layer.condense()
            for norm in NORMS:
                bound = layer.lipschitz(norm=norm)
                assert bound.value == math.inf
                assert "NaN or infinite entries" in bound.reason
            assert not np.isfinite(layer(case.inputs())).all()
        layer.warm_up()
        assert all(np.isfinite(vector).all() for vector in layer._vectors.values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_neighbors_have_no_constant_either(value, x):
    for layer in (
        kl.SpectralDense(3),
        kl.SpectralDense(3, spectral_norm=None),
        kl.CenterNormalization(),
    ):
        layer(x)
        for weight in layer.trainable_variables:
            before = np.copy(weight)
            weight.assign(np.full(weight.shape, value))
            bound = layer.lipschitz()
            assert bound.value == math.inf
            assert "NaN or infinite entries" in bound.reason
            weight.assign(before)
        assert math.isfinite(layer.lipschitz().value)


def test_weights_too_large_for_the_dtype_have_no_constant():
    layer = Case(dtype="mixed_float16").layer()
    layer.query_kernel.assign(1e6 * layer.query_kernel)
    assert layer.lipschitz().value == math.inf
    layer = Case(dtype="float32").layer(scale=1e20)
    bound = layer.lipschitz()
    assert bound.value == math.inf and bound.reason


# Other things Keras offers ------------------------------------------------------


def test_quantization_leaves_the_layers_as_they_are(x):
    inputs = keras.Input((LENGTH, FEATURES))
    attention, dense = kl.L2MultiHeadAttention(2, 3), kl.SpectralDense(3)
    model = keras.Model(inputs, dense(attention(inputs)))
    before, bounds = np.asarray(model(x)), (attention.lipschitz(), dense.lipschitz())
    for layer in (attention, dense):
        with pytest.raises(NotImplementedError, match="quantize"):
            layer.quantize("int8")
    with warnings.catch_warnings():
        # Keras says that it passes by layers which cannot be quantized.
        warnings.simplefilter("ignore")
        model.quantize("int8")
    np.testing.assert_array_equal(model(x), before)
    assert (attention.lipschitz(), dense.lipschitz()) == bounds
    assert not hasattr(attention, "enable_lora")


def test_nan_in_a_valid_token_stays_in_its_example(x):
    x[0, 2] = np.nan
    output = Case(dtype="float32").layer()(x)
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1]).all()
