"""Masks made of integer inputs stay as they are: models that multiply by them have constants."""

import math

import keras
import numpy as np
import pytest
from helpers.certify_cases import default_dtype, jacobian_norm, jacobians, randomize
from keras import layers, ops

import keras_lipattn as kl

TOKENS, WIDTH = 5, 4


def _kept(ids):
    return ops.cast(ops.not_equal(ids, 0), "float64")


def _multiplied(x, ids):
    return x * ops.expand_dims(_kept(ids), -1)


def _dropped(x, ids):
    return ops.tanh(x) * (1.0 - ops.expand_dims(_kept(ids), -1))


def _both(x, ids):
    seen = ops.logical_and(ops.not_equal(ids, 0), ops.less(ids, 4))
    tiled = ops.tile(ops.expand_dims(seen, -1), (1, 1, WIDTH))
    return x * ops.where(tiled, 2.0, -0.5)


def _mean_of_kept(x, ids):
    mask = ops.expand_dims(_kept(ids), -1)
    return ops.sum(x * mask, axis=1) / ops.maximum(ops.sum(mask, axis=1), 1.0)


def _scores(x, ids):
    tokens = layers.LayerNormalization(epsilon=1.0)(x)
    scores = ops.einsum("bqd,bkd->bqk", tokens, tokens)
    scores = scores + (1.0 - ops.expand_dims(_kept(ids), 1)) * -1e9
    return ops.matmul(ops.softmax(scores), tokens)


def _gate_of_scores(x, ids):
    """A product shows whether the range of a sum with a mask is right."""
    bias = (1.0 - ops.expand_dims(_kept(ids), -1)) * -3.0
    scores = ops.tanh(x) + bias
    return scores * scores


def _tokens_kept(x, ids):
    return layers.MultiHeadAttention(2, 2)(ops.tanh(x), _multiplied(ops.tanh(x), ids))


class MeanLayer(layers.Layer):
    def call(self, x, seen):
        w = ops.cast(seen, x.dtype)[..., None]
        return ops.sum(x * w, axis=1) / ops.maximum(ops.sum(w, axis=1), 1.0)


# Means over the tokens of a boolean mask, with a divisor of at least 1.
MEANS = {
    "index": lambda x, seen: (
        ops.sum(x * ops.cast(seen, x.dtype)[..., None], axis=1)
        / ops.maximum(ops.sum(ops.cast(seen, x.dtype), axis=1), 1.0)[:, None]
    ),
    "new axis first": lambda x, seen: (
        ops.sum(x * ops.cast(seen[:, :, None], x.dtype), axis=-2)
        / ops.maximum(ops.sum(ops.cast(seen[:, :, None], x.dtype), axis=-2), 1)
    ),
    "operations": lambda x, seen: ops.divide(
        ops.sum(ops.multiply(x, ops.expand_dims(ops.cast(seen, x.dtype), axis=-1)), axis=1),
        ops.maximum(x1=1.0, x2=ops.sum(ops.cast(seen, x.dtype), axis=1, keepdims=True)),
    ),
    "keywords": lambda x, seen: ops.true_divide(
        x1=ops.sum(x=ops.multiply(x1=ops.cast(seen, x.dtype)[..., None], x2=x), axis=1),
        x2=ops.clip(ops.sum(ops.cast(seen, x.dtype), axis=1), x_min=1, x_max=100.0)[:, None],
    ),
    "integers": lambda x, seen: (
        ops.sum(x * ops.cast(ops.cast(seen, "int32"), x.dtype)[..., None], axis=1)
        / ops.cast(ops.maximum(ops.sum(ops.cast(seen, "int32"), axis=1), 1), x.dtype)[:, None]
    ),
    "layers": lambda x, seen: (
        ops.sum(layers.Multiply()([x, layers.Reshape((-1, 1))(ops.cast(seen, x.dtype))]), axis=1)
        / ops.maximum(ops.sum(ops.cast(seen, x.dtype), axis=1)[:, None], 1.0)
    ),
    "where": lambda x, seen: (
        ops.sum(ops.where(seen[..., None], x, 0.0), axis=1)
        / (1.0 + ops.sum(ops.cast(seen, x.dtype)[..., None], axis=1))
    ),
    "normalized weights": lambda x, seen: ops.sum(
        x
        * (
            ops.cast(seen, x.dtype)
            / ops.maximum(ops.sum(ops.cast(seen, x.dtype), axis=1, keepdims=True), 1.0)
        )[..., None],
        axis=1,
    ),
    "part": lambda x, seen: (
        ops.sum(x[:, 1:] * ops.cast(seen, x.dtype)[:, 1:, None], axis=1)
        / ops.maximum(ops.sum(ops.cast(seen[:, 1:], x.dtype), axis=1), 1.0)[..., None]
    ),
    "custom layer": lambda x, seen: MeanLayer()(x, seen),
}

BUILDS = {
    f"mean, {name}": lambda x, ids, build=build: build(x, ops.not_equal(ids, 0))
    for name, build in MEANS.items()
} | {
    build.__name__: build
    for build in (
        _multiplied,
        _dropped,
        _both,
        _mean_of_kept,
        _scores,
        _gate_of_scores,
        _tokens_kept,
    )
}


def _model(build):
    with default_dtype("float64"):
        x = keras.Input((TOKENS, WIDTH), dtype="float64")
        ids = keras.Input((TOKENS,), dtype="int32")
        model = keras.Model([x, ids], build(x, ids))
    randomize(model)
    return model


@pytest.mark.parametrize("name", BUILDS)
def test_constants_hold_for_all_integers(name):
    model = _model(BUILDS[name])
    rng = np.random.default_rng(0)
    found = dict.fromkeys(("l2", "token", "linf"), 0.0)
    shape = model.output_shape[1:]
    for ids in (np.zeros(TOKENS), np.ones(TOKENS), np.arange(TOKENS), np.eye(TOKENS)[0]):
        points = (
            rng.normal(size=(4, TOKENS, WIDTH)) * np.array([0.01, 1.0, 3.0, 10.0])[:, None, None]
        )
        given = ids.astype("int32")

        def function(x, given=given):
            repeated = ops.convert_to_tensor(np.broadcast_to(given, (len(x), TOKENS)))
            return model([x, repeated], training=False)

        for norm in found:
            for jacobian in jacobians(function, points):
                size = jacobian_norm(jacobian, norm, (WIDTH, shape[-1]))
                found[norm] = max(found[norm], size)
    for norm, value in found.items():
        certificate = kl.certify(model, norm=norm)
        assert certificate.is_finite, certificate.reasons
        # The rounding of a derivative in float64.
        assert 0.0 < value <= certificate.total * (1.0 + 1e-9)


def test_a_mask_of_zeros_and_ones_costs_nothing():
    for norm in ("l2", "token", "linf"):
        assert kl.certify(_model(_multiplied), norm=norm).total == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("name", MEANS)
def test_masks_of_every_source_and_length_give_the_same_mean(name):
    totals = []
    for dtype, length in (("int32", TOKENS), ("bool", TOKENS), ("bool", None)):
        x = keras.Input((length, WIDTH), dtype="float64")
        given = keras.Input((length,), dtype=dtype)
        seen = given if dtype == "bool" else ops.not_equal(given, 0)
        model = keras.Model([x, given], MEANS[name](x, seen))
        certificate = kl.certify(model, sequence_length=None if length else TOKENS, check=True)
        totals.append(certificate.total)
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-6) and totals[0] < math.inf


@pytest.mark.parametrize("least", [None, 0.0, -1.0])
def test_a_mean_that_may_divide_by_zero_names_the_layer_to_use(least):
    def mean(x, ids):
        w = _kept(ids)[..., None]
        count = ops.sum(w, axis=1)
        return ops.sum(x * w, axis=1) / (count if least is None else ops.maximum(count, least))

    certificate = kl.certify(_model(mean))
    assert certificate.total == math.inf
    assert "GlobalAveragePooling1D()(x, mask=mask)" in " ".join(certificate.reasons)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_mask_that_is_a_certified_input_is_refused_with_a_remedy(dtype):
    x, given = keras.Input((TOKENS, WIDTH)), keras.Input((TOKENS,), dtype=dtype)
    w = ops.cast(given, "float32")[..., None]
    mean = ops.sum(x * w, axis=1) / ops.maximum(ops.sum(w, axis=1), 1.0)
    certificate = kl.certify(keras.Model([x, given], mean))
    assert certificate.total == math.inf
    assert "boolean mask" in " ".join(certificate.reasons)


@pytest.mark.parametrize("lowest", [-3, -1, 0, 1, 2])
def test_integers_that_are_cast_stay_in_their_interval(lowest):
    """Casts round towards 0: the entries of a factor show whether its interval is right."""

    def scaled(x, ids):
        fractions = 0.75 * _kept(ids) + (lowest + 0.5)
        return x * ops.cast(ops.cast(fractions, "int32"), "float64")[..., None]

    found = max(abs(int(lowest + 0.5)), abs(int(lowest + 1.25)))
    total = kl.certify(_model(scaled)).total
    assert found <= total <= (abs(lowest) + 2) * (1.0 + 1e-6)


def test_a_mask_that_may_wrap_around_is_not_bounded():
    def wrapped(x, ids):
        small = ops.cast(ops.not_equal(ids, 0), "uint8")
        return x * ops.cast(small - 2 * ops.ones_like(small), "float64")[..., None]

    assert kl.certify(_model(wrapped)).total == math.inf


def test_division_by_what_may_be_zero_is_refused():
    certificate = kl.certify(_model(lambda x, ids: x / ops.expand_dims(_kept(ids), -1)))
    assert certificate.total == math.inf
    assert "close to 0" in " ".join(certificate.reasons)


def test_a_mask_for_all_tokens_together_has_no_bound():
    """Keras divides by the number of entries of the mask, so that a mean becomes a sum."""
    inputs, mask = keras.Input((9, 4)), keras.Input((1,), dtype="bool")
    model = keras.Model([inputs, mask], layers.GlobalAveragePooling1D()(inputs, mask=mask))
    certificate = kl.certify(model)
    assert not certificate.is_finite and "one entry for each token" in certificate.reasons[0]


@pytest.mark.parametrize("valid", [1, 4, 9])
def test_near_an_example_a_mean_knows_its_number_of_valid_tokens(valid):
    inputs, mask = keras.Input((9, 4)), keras.Input((9,), dtype="bool")
    model = keras.Model([inputs, mask], layers.GlobalAveragePooling1D()(inputs, mask=mask))
    center = [np.zeros((1, 9, 4)), np.arange(9)[None] < valid]
    assert kl.certify(model).total == pytest.approx(1.0)
    # The derivative with respect to each valid token is 1 / valid.
    assert kl.certify(model, center=center, radius=0.1).total == pytest.approx(valid**-0.5)
    fixed = layers.GlobalAveragePooling1D()(inputs, mask=center[1])
    assert kl.certify(keras.Model(inputs, fixed)).total == pytest.approx(valid**-0.5)
