"""What is traced is what the model computes, and a certificate that lies is refuted."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src import backend

import keras_lipattn as kl
from keras_lipattn.certification import CertificateRefuted, LipschitzMap, TokenRange, register_rule
from keras_lipattn.certification.registry import LAYER_RULES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask"),
    pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer"),
]


def model(build, shape=(6, 4), **kwargs):
    x = keras.Input(shape, **kwargs)
    return keras.Model(x, build(x))


def spread(model, seed=0):
    """The same model with random weights."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape))
    return model


# Traces -----------------------------------------------------------------------------------------


def tokens_of(*, reversible=False):
    ids = keras.Input((6,), dtype="int32")
    table: Any = layers.ReversibleEmbedding if reversible else layers.Embedding
    return ids, table(9, 4, mask_zero=True)(ids)


def pooled(x):
    return layers.GlobalAveragePooling1D()(x)


def two_inputs():
    a, b = keras.Input((6, 4)), keras.Input((6, 4))
    return keras.Model([a, b], [pooled(a), pooled(b)])


class Moves(layers.Layer):
    """A layer without `build` whose `call` gives its output a mask of its own."""

    def call(self, x, given):
        y = 2.0 * x
        backend.set_keras_mask(y, given)
        return y


MASK_ROUTES = {
    "an embedding": lambda x, m: x,
    "a reversible embedding": lambda x, m: x,
    "a list of inputs of a nested model": lambda x, m: two_inputs()([0.5 * x, x])[1],
    "an argument of a nested model": lambda x, m: model(lambda z: z)(x, mask=m),
    "a mask set by a layer": lambda x, m: Moves()(x, m),
    "a dropout": lambda x, m: layers.Dropout(0.5)(x),
}


@pytest.mark.parametrize("route", MASK_ROUTES)
def test_a_mask_reaches_the_pooling_by_every_route(route):
    ids, x = tokens_of(reversible="reversible" in route)
    y = MASK_ROUTES[route](x, ops.not_equal(ids, 0))
    built = keras.Model(ids, y if len(y.shape) == 2 else pooled(y))
    factor = 2.0 if "set by" in route else 1.0
    # One token may be all that is left to the mean.
    certificate = kl.certify(built, check=True)
    assert certificate.total == pytest.approx(factor)


def test_a_mask_counts_for_the_calls_after_it_and_not_for_those_before():
    ids, x = tokens_of()
    x = layers.Dense(4, kernel_initializer="identity")(Moves()(x, None))
    before = pooled(x)
    inner = model(lambda z: z)
    after = pooled(inner(x, mask=ops.not_equal(ids, 0)))
    built = keras.Model(ids, layers.Concatenate()([before, after]))
    found = kl.certify(built, check=True).total
    assert found >= 2.0 * math.sqrt(1.0 + 1.0 / 6.0) * (1.0 - 1e-6)


def split_heads(x, heads=2):
    batch, length, width = ops.shape(x)
    y = ops.reshape(x, (batch, length, heads, width // heads))
    y = ops.transpose(y, (0, 2, 1, 3))
    return ops.reshape(y, (batch * heads, length, width // heads))


class Heads(layers.Layer):
    """Attention on heads that were moved into the batch axis."""

    def __init__(self):
        super().__init__()
        self.attention = kl.L2MultiHeadAttention(1, 2)

    def call(self, x):
        batch, length, width = ops.shape(x)
        y = self.attention(split_heads(x))
        y = ops.reshape(y, (batch, 2, length, width // 2))
        return ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (batch, length, width))


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_tokens_in_the_batch_axis_have_the_constant_of_one_sequence(norm):
    built = model(Heads())
    (layer,) = built.layers[1]._layers
    one = layer.lipschitz(6, norm=norm).value
    certificate = kl.certify(built, norm=norm, check=True)
    price = math.sqrt(2.0) if norm == "token" else 1.0
    assert one * (1.0 - 1e-9) <= certificate.total <= price * one * (1.0 + 1e-6)


@pytest.mark.parametrize(
    "build",
    [
        split_heads,
        lambda x: ops.reshape(x, (-1, 4)),
        lambda x: ops.mean(x, axis=0),
        lambda x: x * ops.reshape(ops.cast(ops.arange(ops.shape(x)[0]), "float32"), (-1, 1, 1)),
        lambda x: x / ops.cast(ops.shape(x)[0], "float32"),
        lambda x: ops.flip(x, axis=0),
    ],
)
def test_outputs_that_depend_on_the_batch_are_refused(build):
    class Block(layers.Layer):
        def call(self, x):
            return build(x)

    certificate = kl.certify(model(Block()))
    assert certificate.total == math.inf
    assert "batch" in " ".join(certificate.reasons) or "example" in " ".join(certificate.reasons)


def test_code_is_certified_for_the_length_it_ran_at():
    class Ramp(layers.Layer):
        def call(self, x):
            return x * ops.cast(ops.arange(ops.shape(x)[1]), x.dtype)[None, :, None]

    built = model(Ramp(), (None, 4))
    assert "sequence_length" in kl.certify(built).reasons[0]
    certificate = kl.certify(built, sequence_length=20, check=True)
    assert certificate.total == pytest.approx(19.0)
    assert certificate.threat_model.shapes == ((20, 4),)
    assert "(20, 4)" in str(certificate)


def test_a_graph_is_certified_for_all_lengths_up_to_the_given_one():
    certificate = kl.certify(model(layers.Dense(3), (None, 4)), sequence_length=20)
    assert certificate.threat_model.shapes == ()
    assert certificate.threat_model.max_tokens == 20


# Checks -----------------------------------------------------------------------------------------


@pytest.fixture
def rules():
    """Rules that a test registers are gone after it."""
    before = dict(LAYER_RULES)
    yield
    LAYER_RULES.clear()
    LAYER_RULES.update(before)


class Triple(layers.Layer):
    def call(self, x):
        return 3.0 * x


class Averages(layers.Layer):
    def call(self, x):
        return x - ops.mean(x, axis=0, keepdims=True)


class Twice(layers.Layer):
    def call(self, x):
        return ops.tanh(2.0 * x)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_a_rule_whose_constant_is_too_small_is_refuted(rules, norm):
    @register_rule(Triple)
    def triple(layer, call):
        return 2.9

    lying = model(Triple())
    assert kl.certify(lying, norm=norm).total == pytest.approx(2.9)
    with pytest.raises(CertificateRefuted, match="report"):
        kl.certify(lying, norm=norm, check=True)


def test_a_rule_that_hides_what_examples_share_is_refuted(rules):
    @register_rule(Averages)
    def averages(layer, call):
        return 100.0

    assert kl.certify(model(Averages())).is_finite
    with pytest.raises(CertificateRefuted, match="another example"):
        kl.certify(model(Averages()), check=True)


def test_a_rule_whose_range_is_too_small_is_refuted(rules):
    @register_rule(Twice)
    def twice(layer, call):
        return LipschitzMap(constant=2.0, range=TokenRange(0.5))

    with pytest.raises(CertificateRefuted, match="certified range"):
        kl.certify(model(Twice()), check=True)


class WithoutNumbers(layers.Layer):
    """A layer that returns NaN where it is run, but not where its `call` is."""

    def __call__(self, x):
        y = super().__call__(x)
        return y if isinstance(x, keras.KerasTensor) else np.nan * y

    def call(self, x):
        return 1.0 * x


def test_a_model_that_alone_is_nan_is_refuted(rules):
    @register_rule(WithoutNumbers)
    def without_numbers(layer, call):
        return 1.0

    with pytest.raises(CertificateRefuted, match="by nan"):
        kl.certify(model(WithoutNumbers()), check=True)


def test_a_model_that_is_nan_like_its_trace_is_not_refuted():
    ids = keras.Input((2,), dtype="int32")
    built = keras.Model(ids, layers.Dense(3)(pooled(layers.Embedding(2, 4, mask_zero=True)(ids))))
    assert np.isnan(built(np.zeros((1, 2), np.int32))).all()
    assert kl.certify(built, check=True) == kl.certify(built)


INTERPOLATIONS = {
    "same size": lambda: layers.Resizing(4, 4),
    "bilinear": lambda: layers.Resizing(6, 5),
    "bicubic": lambda: layers.Resizing(4, 4, interpolation="bicubic"),
    "cropped": lambda: layers.CenterCrop(6, 6),
    "upsampled": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
}


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_interpolation_in_float32_refutes_no_float64_model(name, channels, norm):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        built = model(lambda x: INTERPOLATIONS[name]()(x), (4, 4, channels), dtype="float64")
    finally:
        keras.config.set_dtype_policy(before)
    assert kl.certify(built, norm=norm, check=True) == kl.certify(built, norm=norm)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float64"])
def test_what_is_certified_withstands_the_check(policy):
    def block(x):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 4)(y, y)
        return x + layers.Dense(4)(layers.Dense(8, activation="gelu")(x))

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        built = spread(model(lambda x: layers.Dense(3, activation="softmax")(pooled(block(x)))))
    finally:
        keras.config.set_dtype_policy(before)
    for norm in ("l2", "token", "linf"):
        assert kl.certify(built, norm=norm, check=True) == kl.certify(built, norm=norm)


def test_a_check_needs_no_gradient_and_changes_nothing():
    built = spread(model(lambda x: ops.sort(layers.Dense(4)(x), axis=-1)))
    weights = [np.array(w) for w in built.get_weights()]
    kl.certify(built, check=True)
    for old, new in zip(weights, built.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


class Operator(keras.layers.Layer):
    """One operator of a weight and the input."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def build(self, input_shape):
        self.vector = self.add_weight(shape=(input_shape[-1],), initializer="ones")
        self.matrix = self.add_weight(shape=(2, input_shape[-2]), initializer="ones")

    def call(self, x):
        return self.operator(self, x)


@pytest.mark.parametrize(
    ("operator", "constant"),
    [
        (lambda layer, x: layer.vector * x, 3.0),
        (lambda layer, x: keras.ops.convert_to_tensor(layer.vector) * x, 3.0),
        (lambda layer, x: layer.vector + x, 1.0),
        (lambda layer, x: layer.vector - x, 1.0),
        (lambda layer, x: layer.matrix @ x, 10.0**0.5),
        (lambda layer, x: keras.ops.where(layer.vector > 1.0, x, 0.0), 1.0),
        (lambda layer, x: keras.ops.where(layer.vector > x, x, 0.0), math.inf),
    ],
)
def test_a_weight_may_be_the_first_operand_of_an_operator(operator, constant):
    inputs = keras.Input((5, 3))
    layer = Operator(operator)
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.array([1.0, 2.0, -3.0]), np.ones((2, 5))])
    assert kl.certify(model).total == pytest.approx(constant, rel=1e-6)
    # The operators of weights are as before.
    assert float(keras.ops.sum(layer.vector * np.ones(3))) == 0.0
