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


BUILDS = {
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


def test_a_mask_that_may_wrap_around_is_not_bounded():
    def wrapped(x, ids):
        small = ops.cast(ops.not_equal(ids, 0), "uint8")
        return x * ops.cast(small - 2 * ops.ones_like(small), "float64")[..., None]

    assert kl.certify(_model(wrapped)).total == math.inf


def test_division_by_what_may_be_zero_is_refused():
    certificate = kl.certify(_model(lambda x, ids: x / ops.expand_dims(_kept(ids), -1)))
    assert certificate.total == math.inf
    assert "close to 0" in " ".join(certificate.reasons)
