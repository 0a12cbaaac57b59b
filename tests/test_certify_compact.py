"""Dot-product attention on bounded tokens: its row of a certificate is attacked in its domain."""

import functools
import itertools
import math

import keras
import numpy as np
import pytest
from helpers import jacobians
from helpers.certify_cases import default_dtype
from keras import layers

import keras_lipattn as kl
from keras_lipattn.bounds.compact import combine_heads, dot_product_constants

TOKENS, WIDTH = 4, 5
# What bounds the tokens, as a layer or a few of them.
SOURCES = {
    "layer norm": lambda: [layers.LayerNormalization(epsilon=1e-3)],
    "plain layer norm": lambda: [layers.LayerNormalization(center=False, scale=False)],
    "rms norm": lambda: [layers.RMSNormalization()],
    "unit norm": lambda: [layers.UnitNormalization()],
    "layer norm, dense": lambda: [layers.LayerNormalization(), layers.Dense(6)],
    "layer norm, dropout": lambda: [layers.LayerNormalization(), layers.Dropout(0.5)],
    "tanh": lambda: [layers.Activation("tanh")],
    "sigmoid, dense": lambda: [layers.Activation("sigmoid"), layers.Dense(3)],
    "radius": lambda: [],
}
FREE = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], bool)
MASKS = {
    "no mask": {},
    "causal": {"use_causal_mask": True},
    "pairs": {"attention_mask": FREE[None]},
}


RADIUS = 1.5


def _model(source, call, rng, scale):
    """A model that ends with attention, and its parts: what bounds the tokens, and attention."""
    with default_dtype("float64"):
        inputs = keras.Input((TOKENS, WIDTH), dtype="float64")
        x = inputs
        for layer in SOURCES[source]():
            x = layer(x)
        attention = layers.MultiHeadAttention(2, 3, 2, name="attention")
        model = keras.Model(inputs, attention(x, x, **call))
    for weight in model.trainable_variables:
        size = scale if "attention" in weight.path else 1.0
        weight.assign(rng.normal(size=weight.shape) * size)
    return model, keras.Model(inputs, x), attention


def _row(model, source, norm):
    radius = RADIUS if source == "radius" else None
    rows = kl.certify(model, norm=norm, input_radius=radius).rows
    return next(row for row in rows if row.path == "attention")


def _starts(source, rng):
    """Inputs of the whole model: any, large, at opposite poles, all but one in one place."""
    direction = rng.normal(size=WIDTH)
    starts = [
        rng.normal(size=(TOKENS, WIDTH)),
        rng.choice([-30.0, 30.0], size=(TOKENS, 1)) * direction,
        30.0 * np.sign(rng.normal(size=(TOKENS, WIDTH))),
        np.where(np.arange(TOKENS)[:, None] > 0, direction, -5.0 * direction),
    ]
    for x in starts:
        if source == "radius":
            x = x * np.minimum(1.0, RADIUS / np.linalg.norm(x, axis=1, keepdims=True))
        yield x


def _climb(source, bounded, attention, call, rng, steps=4):
    """The largest norms of the Jacobian of attention at inputs in its domain."""

    def run(x):
        return attention(x, x, **call)

    def found(z):
        return jacobians.norms(jacobians.jacobian(run, np.asarray(bounded(z[None]))[0]))

    best = dict.fromkeys(("l2", "token", "linf"), 0.0)
    for z in _starts(source, rng):
        top = 0.0
        for _ in range(steps):
            moved = z + 0.3 * np.abs(z).max() * rng.normal(size=z.shape) * (top > 0.0)
            if source == "radius":
                moved *= np.minimum(1.0, RADIUS / np.linalg.norm(moved, axis=1, keepdims=True))
            norms = found(moved)
            best = {norm: max(value, norms[norm]) for norm, value in best.items()}
            if norms["l2"] >= top:
                top, z = norms["l2"], moved
    return best


@pytest.mark.parametrize(
    ("source", "mask"),
    [
        *(("layer norm", mask) for mask in MASKS),
        # Every source, with the masks in turn.
        *zip(list(SOURCES)[1:], itertools.cycle(MASKS), strict=False),
    ],
)
def test_no_search_in_the_domain_climbs_over_the_row(source, mask):
    rng = np.random.default_rng(len(source) + len(mask))
    model, bounded, attention = _model(source, MASKS[mask], rng, rng.choice([0.3, 1.0]))
    for norm, found in _climb(source, bounded, attention, MASKS[mask], rng).items():
        row = _row(model, source, norm)
        assert math.isfinite(row.constant) and "Theorem 7." in row.theorem
        # float64 gradients.
        assert found <= row.constant * (1.0 + 1e-9)


def test_padding_of_any_kind_is_bounded():
    rng = np.random.default_rng(0)
    valid = np.array([[True, True, False, True]])
    for name in ("query_mask", "value_mask", "key_mask"):
        call = {name: valid}
        model, bounded, attention = _model("layer norm", call, rng, 1.0)
        found = _climb("layer norm", bounded, attention, call, rng, steps=2)
        for norm, value in found.items():
            assert value <= _row(model, "layer norm", norm).constant * (1.0 + 1e-9)


def test_scales_of_the_normalization_count_one_by_one():
    rng = np.random.default_rng(1)
    model, _, attention = _model("layer norm", {}, rng, 1.0)
    norm = model.layers[1]
    beta = np.zeros(WIDTH)
    norm.set_weights([np.ones(WIDTH), beta])
    even = _row(model, "layer norm", "l2")
    # One large scale: the smallest ball around stays what it is, the ellipsoid becomes flat.
    norm.set_weights([np.array([1.0, 0.1, 0.1, 0.1, 0.1]), beta])
    flat = _row(model, "layer norm", "l2")
    assert flat.constant < 0.7 * even.constant
    query, _, key, _, value, _, output, _ = (np.asarray(w) for w in attention.weights)
    heads = dot_product_constants(
        query.swapaxes(0, 1),
        key.swapaxes(0, 1),
        radius=flat.radius,
        tokens=TOKENS,
        query_bias=np.asarray(attention.weights[1]),
    )
    ball = combine_heads(np.einsum("dhk,hko->hdo", value, output), heads.l2)
    assert flat.constant < ball


def test_what_is_not_bounded_is_infinite_with_the_reason():
    rng = np.random.default_rng(2)
    model, _, _ = _model("radius", {}, rng, 1.0)
    row = next(row for row in kl.certify(model).rows if row.path == "attention")
    assert math.isinf(row.constant) and "input_radius" in row.reason
    with default_dtype("float64"):
        inputs = keras.Input((TOKENS, WIDTH), dtype="float64")
        x = layers.LayerNormalization()(inputs)
        # A sum with something free is free again.
        free = layers.Add()([x, inputs])
        attention = layers.MultiHeadAttention(2, 3, name="attention")
        model = keras.Model(inputs, attention(free, free))
    row = next(row for row in kl.certify(model).rows if row.path == "attention")
    assert math.isinf(row.constant) and "unbounded" in row.reason
    with default_dtype("float64"):
        inputs = keras.Input((None, WIDTH), dtype="float64")
        x = layers.LayerNormalization()(inputs)
        attention = layers.MultiHeadAttention(2, 3, name="attention")
        model = keras.Model(inputs, attention(x, x))
    row = next(row for row in kl.certify(model).rows if row.path == "attention")
    assert math.isinf(row.constant) and "sequence_length" in row.reason
    known = kl.certify(model, sequence_length=7)
    assert math.isfinite(next(r for r in known.rows if r.path == "attention").constant)


def _attended(attention, x):
    return attention(x, x)


def test_the_ellipsoid_does_not_outlive_what_leaves_it():
    # Tokens that are moved or joined are not in it any more; the ball around them stays.
    rng = np.random.default_rng(3)
    for leave in (
        lambda x: layers.ZeroPadding1D(1)(x),
        lambda x: layers.Reshape((2, 2 * WIDTH))(x),
        lambda x: layers.Permute((2, 1))(x),
        lambda x: layers.Activation("relu")(x),
        lambda x: layers.Add()([x, layers.UnitNormalization()(x)]),
    ):
        with default_dtype("float64"):
            inputs = keras.Input((TOKENS, WIDTH), dtype="float64")
            norm = layers.LayerNormalization()
            x = leave(norm(inputs))
            attention = layers.MultiHeadAttention(2, 3, name="attention")
            model = keras.Model(inputs, attention(x, x))
        bounded = keras.Model(inputs, x)
        for weight in model.trainable_variables:
            weight.assign(rng.normal(size=weight.shape))
        # Flat and away from the origin.
        norm.set_weights([np.array([2.0, 1e-3, 1e-3, 1e-3, 1e-3]), 2.0 * np.ones(WIDTH)])
        constant = _row(model, "", "l2").constant
        if math.isinf(constant):
            continue
        for z in _starts("", rng):
            point = np.asarray(bounded(z[None]))[0]
            run = functools.partial(_attended, attention)
            found = jacobians.norms(jacobians.jacobian(run, point))
            assert found["l2"] <= constant * (1.0 + 1e-9)
