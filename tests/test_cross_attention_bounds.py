"""Attention between different tensors in balls, under attack."""

import math

import numpy as np
import pytest

from keras_lipattn.bounds.compact import (
    additive_attention_constants,
    cross_attention_constants,
)

# Central differences with step 1e-6 of functions of size 1.
DIFFERENCES = 1e-6
QUERIES, KEYS = 3, 4


def softmax(logits, mask):
    weights = np.where(mask, np.exp(logits - logits.max(axis=1, keepdims=True)), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def tokens_in_ball(rng, tokens, width, radius, center):
    """Tokens inside, on the sphere, or at its two poles along one direction."""
    x = rng.normal(size=(tokens, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kind = rng.integers(3)
    if kind == 1:
        x *= rng.random((tokens, 1))
    if kind == 2:
        x = rng.choice([-1.0, 1.0], size=(tokens, 1)) * x[:1]
    return center + radius * x


def jacobian(function, x):
    h = 1e-6
    columns = [
        (function(x + h * e.reshape(x.shape)) - function(x - h * e.reshape(x.shape))) / (2 * h)
        for e in np.eye(x.size)
    ]
    return np.stack(columns, axis=-1).reshape(*columns[0].shape, *x.shape)


def row_norm(jacobian_of_row, weights):
    """Largest change of a row for changes with `sum_j P_j |change_j|^2 <= 1`."""
    seen = weights > 0.0
    scaled = jacobian_of_row[:, seen] / np.sqrt(weights[seen])[None, :, None]
    return np.linalg.norm(scaled.reshape(len(jacobian_of_row), -1), 2)


def _check(found, bound):
    assert found <= bound + DIFFERENCES * (1.0 + bound)


@pytest.mark.parametrize("additive", [False, True])
def test_no_change_of_one_input_moves_a_row_farther(additive):
    rng = np.random.default_rng(0)
    closest = 0.0
    for _ in range(60):
        wide, narrow, size = rng.integers(1, 4, size=3)
        narrow = wide if additive else narrow
        radii = rng.uniform(0.2, 3.0, size=3)
        widths = (wide, narrow, narrow)
        centers = [rng.normal(size=width) for width in widths]
        x, y, z = (
            tokens_in_ball(rng, count, width, radius, center)
            for count, width, radius, center in zip(
                (QUERIES, KEYS, KEYS), widths, radii, centers, strict=True
            )
        )
        mask = rng.random((QUERIES, KEYS)) < 0.6
        mask[np.arange(QUERIES), rng.integers(KEYS, size=QUERIES)] = True
        if additive:
            weights = rng.normal(size=wide)

            def additive_logits(x, y, weights=weights):
                return np.tanh(x[:, None] + y[None]) @ weights

            logits = additive_logits

            constants = additive_attention_constants(weights, value_radius=radii[2])
            shared = additive_attention_constants(weights, value_radius=radii[2])
        else:
            query, key = rng.normal(size=(wide, size)), rng.normal(size=(narrow, size))
            bias = rng.normal(size=size)

            def dot_logits(x, y, query=query, key=key, bias=bias):
                return (x @ query + bias) @ (y @ key + 1.0).T / math.sqrt(len(bias))

            logits = dot_logits

            fields = dict(
                query_radius=radii[0],
                value_radius=radii[2],
                query_center=centers[0],
                query_bias=bias[None],
            )
            constants = cross_attention_constants(
                query[None], key[None], key_radius=radii[1], **fields
            )
            shared = cross_attention_constants(
                query[None], key[None], key_radius=radii[2], **fields
            )

        def attend(x, y, z, logits=logits, mask=mask):
            return softmax(logits(x, y), mask) @ z

        weights = softmax(logits(x, y), mask)
        both = softmax(logits(x, z), mask)
        of_query = jacobian(lambda x, y=y, z=z: attend(x, y, z), x)
        of_key = jacobian(lambda y, x=x, z=z: attend(x, y, z), y)
        of_both = jacobian(lambda z, x=x: attend(x, z, z), z)
        for i in range(QUERIES):
            query_found = np.linalg.norm(of_query[i, :, i], 2)
            _check(query_found, np.max(constants.query))
            _check(row_norm(of_key[i], weights[i]), np.max(constants.key))
            found = row_norm(of_both[i], both[i])
            _check(found, np.max(shared.shared))
            closest = max(closest, found / np.max(shared.shared))
    # The attack comes close: a bound that is far too large would pass anything.
    assert closest > 0.7


def test_tokens_without_a_ball_have_no_constant_where_it_matters():
    kernel = np.ones((1, 2, 1))
    constants = cross_attention_constants(
        kernel, kernel, query_radius=math.inf, key_radius=1.0, value_radius=1.0
    )
    assert np.isfinite(constants.query).all()
    assert np.isinf(constants.key).all()
    assert np.isinf(constants.shared).all()
    assert np.isinf(additive_attention_constants(np.ones(2), value_radius=math.inf).query)
