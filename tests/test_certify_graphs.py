"""Constants of whole graphs, computed by hand, and how rows and inputs are named."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.certification import certify


def scaled(factor, size=2, activation=None, name=None):
    """A layer that multiplies by a number."""
    return matrix(factor * np.eye(size), activation=activation, name=name)


def matrix(kernel, activation=None, name=None):
    """A Dense layer with this kernel and no bias."""
    kernel = np.asarray(kernel, np.float32)

    initializer: Any = keras.initializers.Constant(kernel)

    return layers.Dense(
        kernel.shape[1],
        activation=activation,
        use_bias=False,
        kernel_initializer=initializer,
        name=name,
    )


def one_input(build, shape=(2,)):
    x = keras.Input(shape)
    return keras.Model(x, build(x))


def two_inputs(build, shape=(2,)):
    a, b = keras.Input(shape), keras.Input(shape)
    return keras.Model([a, b], build(a, b))


def shared_layer(x):
    layer = scaled(2.0, activation="relu")
    return layer(layer(x))


def shared_model(x):
    inner = keras.Sequential([keras.Input((2,)), scaled(2.0, activation="relu")])
    return layers.Add()([inner(x), inner(inner(x))])


def diamond(x):
    trunk = scaled(2.0, activation="relu")(x)
    return layers.Add()(
        [scaled(3.0, activation="relu")(trunk), scaled(4.0, activation="relu")(trunk)]
    )


def batch_norm_after_dense(x):
    norm: Any = layers.BatchNormalization(epsilon=0.0)
    y = norm(matrix([[2.0, 0.0], [0.0, 0.5]])(x))
    norm.moving_variance.assign([16.0, 0.25])
    return y


def relu(factor):
    return scaled(factor, activation="relu")


GRAPHS = {
    # name: (model, {norm: constant})
    "chain": (lambda: one_input(lambda x: scaled(3.0)(relu(2.0)(x))), dict(l2=6, token=6, linf=6)),
    "linear maps merge": (
        lambda: one_input(
            lambda x: matrix([[0.0, 0.0], [0.0, 3.0]])(matrix([[2.0, 0.0], [0.0, 0.0]])(x))
        ),
        dict(l2=0, token=0, linf=0),
    ),
    "three linear maps": (
        lambda: one_input(
            lambda x: matrix([[5.0, 0], [0, 1]])(
                layers.Dropout(0.5)(matrix([[1.0, 0], [0, 4]])(matrix([[0.5, 0], [0, 0.5]])(x)))
            )
        ),
        dict(l2=2.5, linf=2.5),
    ),
    "residual": (lambda: one_input(lambda x: layers.Add()([x, relu(2.0)(x)])), dict(l2=3, linf=3)),
    "linear residual": (
        lambda: one_input(lambda x: x + scaled(-0.75)(x)),
        dict(l2=0.25, linf=0.25),
    ),
    "convex residual": (
        lambda: one_input(lambda x: kl.Residual(0.25)([x, relu(2.0)(x)])),
        dict(l2=1.25, token=1.25, linf=1.25),
    ),
    "difference of equals": (
        lambda: one_input(lambda x: layers.Subtract()([scaled(3.0)(x), scaled(3.0)(x)])),
        dict(l2=0, linf=0),
    ),
    "average": (
        lambda: one_input(lambda x: layers.Average()([relu(1.0)(x), relu(2.0)(x), relu(3.0)(x)])),
        dict(l2=2, linf=2),
    ),
    "diamond": (lambda: one_input(diamond), dict(l2=14, token=14, linf=14)),
    "maximum": (
        lambda: one_input(lambda x: layers.Maximum()([relu(3.0)(x), relu(4.0)(x)])),
        dict(l2=5, token=5, linf=4),
    ),
    "concatenation along the last axis": (
        lambda: one_input(lambda x: layers.Concatenate()([relu(3.0)(x), relu(4.0)(x)])),
        dict(l2=5, token=5, linf=4),
    ),
    "concatenation of tokens": (
        lambda: one_input(
            lambda x: layers.Concatenate(axis=1)([relu(3.0)(x), relu(4.0)(x)]), (3, 2)
        ),
        dict(l2=5, token=4, linf=4),
    ),
    "parallel linear heads": (
        lambda: one_input(
            lambda x: layers.Concatenate()([matrix([[3.0], [0.0]])(x), matrix([[0.0], [4.0]])(x)])
        ),
        dict(l2=4, linf=4),
    ),
    "two outputs": (
        lambda: keras.Model(x := keras.Input((2,)), [relu(3.0)(x), relu(4.0)(x)]),
        dict(l2=5, token=4, linf=4),
    ),
    "sum of two inputs": (
        lambda: two_inputs(lambda a, b: a + b),
        dict(l2=math.sqrt(2.0), token=2, linf=2),
    ),
    "weighted sum of two inputs": (
        lambda: two_inputs(lambda a, b: relu(3.0)(a) + relu(4.0)(b)),
        dict(l2=5, token=7, linf=7),
    ),
    "two inputs side by side": (
        lambda: two_inputs(lambda a, b: layers.Concatenate(axis=1)([a, b]), (3, 2)),
        dict(l2=1, token=1, linf=1),
    ),
    "sum of three inputs": (
        lambda: keras.Model(
            xs := [keras.Input((2,)) for _ in range(3)], relu(1.0)(layers.Add()(xs))
        ),
        dict(l2=math.sqrt(3.0), linf=3),
    ),
    "an input used twice and one once": (
        lambda: two_inputs(lambda a, b: relu(1.0)(a) + relu(1.0)(relu(1.0)(a)) + relu(1.0)(b)),
        dict(l2=math.sqrt(5.0), linf=3),
    ),
    "shared layer": (lambda: one_input(shared_layer), dict(l2=4, linf=4)),
    "shared model": (lambda: one_input(shared_model), dict(l2=6, linf=6)),
    "multiplication by a constant": (
        lambda: one_input(lambda x: relu(2.0)(x) * np.array([0.5, -3.0], np.float32)),
        dict(l2=6, linf=6),
    ),
    "batch normalization merges": (
        lambda: one_input(batch_norm_after_dense),
        dict(l2=1.0, linf=1.0),
    ),
    "mean of tokens": (
        lambda: one_input(lambda x: layers.GlobalAveragePooling1D()(relu(2.0)(x)), (4, 2)),
        dict(l2=1, token=2, linf=2),
    ),
    "flattened": (
        lambda: one_input(lambda x: layers.Flatten()(relu(2.0)(x)), (4, 2)),
        dict(l2=2, token=4, linf=2),
    ),
    "first token": (
        lambda: one_input(lambda x: relu(2.0)(x)[:, 0], (4, 2)),
        dict(l2=2, token=2, linf=2),
    ),
    "gate": (
        lambda: one_input(
            lambda x: layers.Multiply()(
                [layers.Activation("tanh")(x), layers.Activation("sigmoid")(x)]
            )
        ),
        # max|sigmoid| * 1 + max|tanh| * 1/4
        dict(l2=1.25, linf=1.25),
    ),
    "nothing": (lambda: one_input(lambda x: layers.Identity()(x)), dict(l2=1, token=1, linf=1)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_hand_computed_constants(name):
    build, constants = GRAPHS[name]
    model = build()
    for norm, constant in constants.items():
        certificate = certify(model, norm=norm)
        # Never below; above by the safety factors only.
        assert certificate.total == pytest.approx(constant, rel=1e-6, abs=1e-12), norm
        assert certificate.total >= constant


def test_costs_sum_to_the_logarithm_of_the_total():
    certificate = certify(one_input(lambda x: layers.Add()([scaled(3.0)(diamond(x)), x])))
    assert sum(row.cost for row in certificate.rows) == pytest.approx(
        math.log(certificate.total), abs=1e-6
    )


def test_rows_have_unique_paths_in_nested_and_shared_models():
    inner = keras.Sequential([keras.Input((2,)), scaled(2.0, name="a"), relu(1.0)], name="inner")
    outer_layer = scaled(2.0, name="a")

    def build(x):
        return outer_layer(inner(outer_layer(inner(x))))

    middle = keras.Sequential([keras.Input((2,)), inner, scaled(1.0, name="b")], name="middle")
    x = keras.Input((2,))
    certificate = certify(keras.Model(x, middle(build(x))))
    paths = [row.path for row in certificate.rows]
    assert len(set(paths)) == len(paths)
    assert {"inner/a", "inner/a:call2", "a", "a:call2", "middle/inner/a", "middle/b"} <= set(paths)


def test_paths_are_the_same_every_time():
    class Block(layers.Layer):
        def call(self, x):
            return ops.tanh(2.0 * x) + x

    model = one_input(Block(name="block"))
    first, second = certify(model), certify(model)
    assert first == second
    assert [row.path for row in first.rows] == ["block/multiply", "block/tanh", "block/add"]


def test_sequential_models_of_any_kind():
    built = keras.Sequential([keras.Input((2,)), relu(2.0), scaled(3.0)])
    late = keras.Sequential([relu(2.0), scaled(3.0)])
    late(np.zeros((1, 2), np.float32))
    subclass = type("Mine", (keras.Model,), {})(x := keras.Input((2,)), relu(6.0)(x))
    for model in (built, late, subclass):
        assert certify(model).total == pytest.approx(6.0)


def test_dynamic_lengths_use_the_sequence_length():
    x = keras.Input((None, 8))
    attention = kl.L2MultiHeadAttention(2, 4)
    model = keras.Model(x, attention(x))
    open_ended = certify(model)
    assert not open_ended.is_finite
    assert "sequence_length" in open_ended.reasons[0]
    certificate = certify(model, sequence_length=10)
    assert certificate.total == pytest.approx(attention.lipschitz(sequence_length=10).value)
    assert certificate.threat_model.max_tokens == 10
    assert "at most 10 tokens that attend" in str(certificate)


def test_a_shorter_sequence_never_breaks_the_certificate():
    x = keras.Input((None, 2))
    model = keras.Model(x, layers.GlobalAveragePooling1D()(x))
    # One token may be all there is: its mean has constant 1, whatever the longest length.
    assert certify(model, sequence_length=100).total == pytest.approx(1.0)
    pooled = keras.Model(x, layers.AveragePooling1D(3, 2, padding="same")(x))
    total = certify(pooled, sequence_length=9).total
    for length in range(1, 10):
        fixed = keras.Input((length, 2))
        one = keras.Model(fixed, layers.AveragePooling1D(3, 2, padding="same")(fixed))
        assert certify(one).total <= total


def test_the_length_follows_concatenated_tokens():
    x: Any = keras.Input((None, 4))
    attention = kl.L2MultiHeadAttention(2, 2)
    token = np.zeros((1, 1, 4), np.float32)
    joined = ops.concatenate([ops.repeat(x[:, :1] * 0.0 + token, 2, axis=1), x], axis=1)
    model = keras.Model(x, attention(joined))
    row = certify(model, sequence_length=5).row(attention.name)
    assert row.tokens == 7
    assert row.constant == attention.lipschitz(sequence_length=7).value


def test_nested_models_see_the_sizes_they_are_called_with():
    x = keras.Input((None, 4))
    attention = kl.L2MultiHeadAttention(2, 2)
    inner = keras.Model(x, attention(x), name="inner")
    y = keras.Input((6, 4))
    row = certify(keras.Model(y, inner(y))).row(f"inner/{attention.name}")
    assert row.tokens == 6


def test_integer_inputs_are_certified_from_the_embedding():
    ids = keras.Input((5,), dtype="int32", name="ids")
    positions = layers.Embedding(5, 3)(np.arange(5))
    x = layers.Embedding(7, 3, name="words")(ids) + positions
    certificate = certify(keras.Model(ids, scaled(2.0, 3)(x)))
    assert certificate.total == pytest.approx(2.0)
    assert certificate.threat_model.inputs == ("output of Embedding 'words'",)
    assert certificate.threat_model.fixed_inputs == ("ids",)
    assert "fixed inputs: ids" in str(certificate)


def test_two_embeddings_count_side_by_side():
    words, kinds = (keras.Input((5,), dtype="int32") for _ in range(2))
    x = layers.Embedding(7, 3)(words) + layers.Embedding(2, 3)(kinds)
    certificate = certify(keras.Model([words, kinds], x))
    assert certificate.total == pytest.approx(math.sqrt(2.0))


def test_integer_images_are_certified_as_numbers():
    image = keras.Input((4, 4, 1), dtype="uint8")
    model = keras.Model(image, layers.Flatten()(layers.Rescaling(1.0 / 255.0)(image)))
    certificate = certify(model)
    assert certificate.total == pytest.approx(1.0 / 255.0)
    assert not certificate.threat_model.fixed_inputs


def test_an_integer_input_both_looked_up_and_computed_with_is_refused():
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 5)(ids)
    y = layers.Rescaling(0.1)(ids)
    certificate = certify(keras.Model(ids, x[:, 0] + y))
    assert not certificate.is_finite
    assert "looked up" in certificate.reasons[0]


def test_a_model_without_certified_inputs_is_not_certified():
    mask = keras.Input((5,), dtype="bool")
    certificate = certify(keras.Model(mask, ops.cast(mask, "float32")))
    assert not certificate.is_finite
    assert certificate.reasons


def test_masks_from_integers_are_fixed():
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(ids)
    attention = kl.L2MultiHeadAttention(2, 2)
    x = attention(x)
    valid = ops.cast(ops.expand_dims(ops.not_equal(ids, 0), -1), "float32")
    model = keras.Model(ids, layers.GlobalAveragePooling1D()(layers.Multiply()([x, valid])))
    certificate = certify(model)
    # `valid` has no Keras mask, so `Multiply` passes none on: the mean is over all five tokens.
    expected = attention.lipschitz(5).value / math.sqrt(5.0)
    assert certificate.total == pytest.approx(expected, rel=1e-6)


def test_mean_pooling_under_a_mask_counts_one_token():
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(ids)
    assert certify(keras.Model(ids, layers.GlobalAveragePooling1D()(x))).total == pytest.approx(1.0)
