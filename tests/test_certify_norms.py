"""A certificate in one norm bounds the others: gains are relaxed after every call."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers import jacobians
from keras import layers

import keras_lipattn as kl
from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.other_norms import price
from keras_lipattn.certification.tensor_state import TensorState

NORMS = ("linf", "token", "l2")
TOKENS, WIDTH = 6, 4


def encoder(depth, width=WIDTH, tokens=TOKENS, *, head=False):
    keras.utils.set_random_seed(depth)
    x = inputs = keras.Input((tokens, width), dtype="float64")
    options: dict[str, Any] = {"dtype": "float64"}
    for _ in range(depth):
        y = layers.LayerNormalization(epsilon=1e-3, **options)(x)
        x = x + layers.MultiHeadAttention(2, width // 2, **options)(y, y)
        y = layers.LayerNormalization(epsilon=1e-3, **options)(x)
        y = layers.Dense(2 * width, activation="gelu", **options)(y)
        x = layers.Add(**options)([x, layers.Dense(width, **options)(y)])
    if head:
        x = layers.GlobalAveragePooling1D(**options)(x)
        x = layers.Dense(3, **options)(x)
    return keras.Model(inputs, x)


def l2_network(heads):
    keras.utils.set_random_seed(heads)
    options: dict[str, Any] = {"dtype": "float64"}
    x = inputs = keras.Input((TOKENS, WIDTH), dtype="float64")
    for _ in range(3):
        x = layers.Add(**options)([x, kl.L2MultiHeadAttention(heads, 2, **options)(x)])
        x = layers.Dense(WIDTH, activation="relu", **options)(x)
    return keras.Model(inputs, layers.Flatten(**options)(x))


def two_inputs():
    a, b = (keras.Input((TOKENS, WIDTH), dtype="float64", name=name) for name in "ab")
    options: dict[str, Any] = {"dtype": "float64"}
    x = layers.Add(**options)([layers.Dense(WIDTH, **options)(a), b])
    x = kl.L2MultiHeadAttention(2, 2, **options)(x)
    return keras.Model([a, b], layers.Concatenate(axis=1, **options)([x, a]))


MODELS = {
    "encoder": lambda: encoder(2),
    "classifier": lambda: encoder(2, head=True),
    "one head": lambda: l2_network(1),
    "three heads": lambda: l2_network(3),
    "two inputs": two_inputs,
}


def _sizes(shape):
    """Tokens and width of one example."""
    return math.prod(shape[1:-1]), shape[-1]


def _price(source, target, tokens, width):
    entries = {"l2": 1, "token": tokens, "linf": tokens * width}
    return math.sqrt(max(1.0, entries[source] / entries[target]))


@pytest.mark.parametrize("name", MODELS)
def test_certificates_bound_each_other(name):
    model = MODELS[name]()
    totals = {norm: kl.certify(model, norm=norm).total for norm in NORMS}
    tokens, width = _sizes(model.inputs[0].shape)
    before = (tokens * len(model.inputs), width)
    after = _sizes(model.outputs[0].shape)
    for norm in NORMS:
        for other in NORMS:
            # The map as one in another norm, from and to which all tensors are converted.
            bound = totals[other] * _price(norm, other, *before) * _price(other, norm, *after)
            assert totals[norm] <= 1.5 * bound, (norm, other)


@pytest.mark.parametrize("name", MODELS)
def test_costs_sum_to_the_logarithm_of_the_total(name):
    for norm in NORMS:
        certificate = kl.certify(MODELS[name](), norm=norm)
        costs = math.fsum(row.cost for row in certificate.rows)
        assert costs == pytest.approx(math.log(certificate.total), abs=1e-6)
        assert certificate.published_total >= certificate.total * (1 - 1e-9)


@pytest.mark.parametrize("name", ["encoder", "one head", "three heads"])
def test_no_jacobian_exceeds_a_certificate(name):
    model = MODELS[name]()
    rng = np.random.default_rng(0)
    certificates = {norm: kl.certify(model, norm=norm).total for norm in NORMS}
    for scale in (1e-2, 1.0):
        x = scale * rng.normal(size=(TOKENS, WIDTH))
        found = jacobians.norms(jacobians.jacobian(lambda x: model(x, training=False), x))
        for norm in NORMS:
            assert found[norm] <= certificates[norm]


def test_deep_encoders_pay_the_price_of_the_max_norm_once():
    model = encoder(12, 64, 32)
    log = {norm: kl.certify(model, norm=norm).log10 for norm in NORMS}
    # Each of the 24 normalizations alone costs sqrt(64) more in the max norm.
    assert log["linf"] <= log["token"] + math.log10(math.sqrt(64)) + 1e-6
    assert log["l2"] <= log["token"] + math.log10(math.sqrt(32)) + 1e-6


def test_prices_are_the_largest_ratios_of_norms():
    nothing = Gain.none("l2")
    state = TensorState(gain=nothing, published=nothing, shape=(5, 3), dynamic=(False,) * 2, fold=2)
    assert price(state, "token", "l2") == pytest.approx(math.sqrt(10))
    assert price(state, "linf", "l2") == pytest.approx(math.sqrt(30))
    assert price(state, "linf", "token") == pytest.approx(math.sqrt(3))
    for large, small in (("l2", "token"), ("l2", "linf"), ("token", "linf"), ("l2", "l2")):
        assert price(state, large, small) == 1.0
    unknown = state.replace(shape=(None, 3))
    assert price(unknown, "token", "l2") == price(unknown, "linf", "l2") == math.inf
    assert price(unknown, "linf", "token") == pytest.approx(math.sqrt(3))
    assert price(state.replace(shape=(), dynamic=(), fold=1), "linf", "l2") == pytest.approx(1.0)


class Factors(keras.layers.Layer):
    """Its input times a weight, broadcast against each other."""

    def __init__(self, shape, first):
        super().__init__()
        self.shape, self.first = shape, first

    def build(self, input_shape):
        self.factors = self.add_weight(shape=self.shape, initializer="glorot_normal")

    def call(self, x):
        return self.factors * x if self.first else keras.ops.multiply(x, self.factors)


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ((5, 1), (5, 4)),
        ((5, 1), (1, 5, 4)),
        ((5, 1), (4,)),
        ((1, 4), (5, 4)),
        ((1, 4), (5, 1)),
        ((1, 1), (5, 4)),
        ((1,), (4,)),
        ((3, 1, 2), (1, 5, 1)),
        ((3, 1, 1), (5, 2)),
    ],
)
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_repeated_entries_count_the_factors_that_each_is_multiplied_by(shape, factors, norm):
    inputs = keras.Input(shape)
    layer = Factors(factors, first=len(shape) == 2)
    model = keras.Model(inputs, layer(inputs))
    weight = np.random.default_rng(0).normal(size=factors)
    layer.set_weights([weight])

    def size(values):
        entries = np.abs(values).reshape(len(values), -1)
        if norm == "linf":
            return entries.max(axis=1)
        if norm == "l2":
            return np.linalg.norm(entries, axis=1)
        tokens = np.linalg.norm(values, axis=-1)
        return tokens.reshape(len(values), -1).max(axis=1)

    # The largest gain is that of an input with a single entry.
    single = np.eye(math.prod(shape)).reshape(-1, *shape)
    some = np.random.default_rng(1).normal(size=(200, *shape))
    kernel = np.array(layer.get_weights()[0], np.float64)
    gains = [float((size(x * kernel) / size(x)).max()) for x in (single, some)]
    total = kl.certify(model, norm).total
    assert max(gains) <= total <= gains[0] * (1.0 + 1e-6)
