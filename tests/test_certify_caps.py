"""With a cap the certificate is for the scale that runs, whatever masks it is asked about."""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import jacobians

import keras_lipattn as kl
from keras_lipattn.bounds import s_star
from keras_lipattn.certification import certify


def _between_clusters(tokens, seen):
    """Tokens `(1, T, 2)`: one between two clusters of those it sees, the others far away."""
    distance = math.sqrt(s_star(seen) + 1.5)
    x = np.zeros((1, tokens, 2))
    x[0, : tokens - 1 - seen, 1] = 100.0
    x[0, tokens - 1 - seen : -1, 0] = np.where(np.arange(seen) % 2, distance, -distance)
    return x


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("call", "options"),
    [
        ({}, {"mask": "any"}),
        ({}, {"mask": "causal"}),
        ({}, {"mask": np.ones((33, 33), bool)}),
        ({"use_causal_mask": True}, {"mask": "any"}),
        ({"use_causal_mask": True, "window": 9, "pairs": "array"}, {}),
        ({"use_causal_mask": True, "window": 9, "pairs": "input"}, {}),
        ({"use_causal_mask": True, "pairs": "input"}, {}),
    ],
)
def test_a_certificate_counts_the_cap_of_the_call_whatever_it_is_told(call, options, relative):
    # A cap for fewer pairs scales down less. In a norm other than its own nothing else would tell.
    call, tokens = dict(call), 33
    window, kind = call.pop("window", None), call.pop("pairs", None)
    layer = kl.L2MultiHeadAttention(
        1,
        2,
        use_bias=False,
        lipschitz_bound=1.0,
        sliding_window=window,
        max_relative_position=1 if relative else None,
        dtype="float64",
    )
    inputs = keras.Input((tokens, 2), dtype="float64")
    pairs = keras.Input((tokens, tokens), dtype="bool")
    given = {"array": np.ones((tokens, tokens), bool), "input": pairs, None: None}[kind]
    model = keras.Model(
        [inputs, pairs] if kind == "input" else inputs,
        layer(inputs, attention_mask=given, **call),
    )
    layer.query_kernel.assign(2**0.25 * np.eye(2)[:, None])
    layer.value_kernel.assign(np.eye(2)[:, None])
    layer.output_kernel.assign(np.eye(2)[None])
    if relative:
        layer.relative_bias.assign([[8.0, 0.0]])
    layer.condense()

    def run(x):
        everything = tf.ones((x.shape[0], tokens, tokens), "bool")
        return model([x, everything] if kind == "input" else x)

    x = _between_clusters(tokens, 8 if window else tokens - 1)
    found = jacobians.norms(jacobians.jacobian(run, x[0]))
    for norm in ("l2", "token", "linf"):
        certificate = certify(model, norm=norm, inputs=[inputs.name], **options)
        assert found[norm] <= certificate.total * (1.0 + 1e-6), norm


@pytest.mark.parametrize("make", [kl.L2MultiHeadAttention, kl.ScaledCosineAttention])
@pytest.mark.parametrize("causal", [False, True])
def test_more_masks_never_have_the_smaller_constant(make, causal):
    inputs = keras.Input((9, 4), dtype="float64")
    layer = make(2, 3, lipschitz_bound=0.01, dtype="float64")
    model = keras.Model(inputs, layer(inputs, use_causal_mask=causal))
    for norm in ("l2", "token", "linf"):
        own = certify(model, norm=norm).total
        assert certify(model, norm=norm, mask="any").total >= own * (1.0 - 1e-9)
