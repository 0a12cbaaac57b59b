"""Decoding token by token gives what the causal layer gives on the whole sequence."""

import numpy as np
import pytest
import tensorflow as tf

import keras_lipattn as kl

CASES = {
    "plain": {},
    "window": {"sliding_window": 3},
    "caps": {"spectral_norm": 1.0, "lipschitz_bound": 0.7},
    "token cap": {"lipschitz_bound": 0.3, "lipschitz_norm": "token"},
    "output shape": {"output_shape": (3, 2)},
    "no bias": {"use_bias": False},
    "relative": {"max_relative_position": 3},
    "relative, cap": {"max_relative_position": 20, "lipschitz_bound": 0.7, "sliding_window": 5},
    "bfloat16": {"dtype": "mixed_bfloat16"},
}
# Of the largest output. In bfloat16 the cache keeps 8 bits of each projected token.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}


@pytest.mark.parametrize("condensed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_the_full_pass(name, condensed):
    layer = kl.L2MultiHeadAttention(2, 4, **CASES[name])
    # Far from the origin, where distances are easily lost.
    x = np.random.default_rng(0).normal(size=(2, 12, 6)).astype("float32") + 3.0
    layer(x)
    if layer.relative_bias is not None:
        layer.relative_bias.assign(np.random.default_rng(1).normal(size=layer.relative_bias.shape))
    layer.condense()
    expected = layer(x, use_causal_mask=True)

    def decode_all():
        step = tf.function(layer.decode)
        cache = layer.init_cache(2, 12)
        output, cache = step(x[:, :5], cache, 0)
        outputs = [output]
        for position in range(5, 12):
            output, cache = step(x[:, position : position + 1], cache, tf.constant(position))
            outputs.append(output)
        return tf.concat(outputs, axis=1), cache

    if condensed:
        with kl.condensed(layer):
            found, cache = decode_all()
    else:
        found, cache = decode_all()
    assert found.shape == expected.shape
    assert cache.shape == (2, 12, 8)
    tolerance = TOLERANCE[layer.compute_dtype] * max(1.0, float(tf.reduce_max(abs(expected))))
    np.testing.assert_allclose(
        tf.cast(found, "float32"), tf.cast(expected, "float32"), atol=tolerance
    )


def test_the_cache_is_half_of_keys_and_values():
    layer = kl.L2MultiHeadAttention(2, 4)
    layer.build((None, 12, 6))
    keys_and_values = 2 * 3 * 12 * 2 * 4
    assert np.prod(layer.init_cache(3, 12).shape) * 2 == keys_and_values


def test_decoding_further_than_the_cap_holds_is_refused():
    layer = kl.L2MultiHeadAttention(2, 4, lipschitz_bound=1.0, max_sequence_length=8)
    layer.build((None, None, 6))
    with pytest.raises(ValueError, match=r"at most 8 tokens .*Received: an input of 9 tokens"):
        layer.init_cache(1, 9)


def test_decoding_needs_a_built_layer():
    with pytest.raises(ValueError, match="Received: built=False"):
        kl.L2MultiHeadAttention(2, 4).init_cache(1, 9)
