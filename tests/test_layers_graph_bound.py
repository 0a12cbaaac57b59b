"""The bound as a tensor of the graph: not below the certified one, whatever the weights."""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false

import numpy as np
import pytest
import tensorflow as tf
from helpers.layer_cases import FEATURES, LENGTH, Case, randomize

import keras_lipattn as kl

NORMS = ("l2", "token", "linf")
# Remembered norms of caps carry an allowance of 1e-6 each, sums in float32 a few roundings;
# in bfloat16 the certificate is for rounded constants.
BELOW = {"float64": 2e-5, "float32": 2e-5, "mixed_bfloat16": 0.01}


def _layers(dtype):
    for cap in (None, "both"):
        yield Case("value dim", cap=cap, dtype=dtype).layer()
        yield Case("relative", cap=cap, dtype=dtype).layer()
    neighbors = (
        kl.SpectralDense(5, dtype=dtype),
        kl.SpectralDense(5, spectral_norm=None, dtype=dtype),
        kl.OrthogonalDense(5, dtype=dtype),
        kl.NormalizedDense(5, dtype=dtype),
    )
    for layer in (*neighbors, kl.CenterNormalization(dtype=dtype)):
        layer.build((None, LENGTH, FEATURES))
        yield layer


@pytest.mark.parametrize("dtype", BELOW)
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_not_below_the_certified_bound(norm, dtype):
    for layer in _layers(dtype):
        # Exact norms for the caps, so that both speak of the same weights.
        for scale, mask in ((1e-3, "full"), (1.0, "causal"), (30.0, "any")):
            randomize(layer, scale=scale)
            if hasattr(layer, "condense"):
                layer.condense()
            exact = layer.lipschitz(norm=norm, mask=mask).value
            assert float(layer.graph_bound(norm=norm, mask=mask)) >= exact * (1.0 - BELOW[dtype])
            with kl.condensed(layer):
                # With constants it is the certified number itself, but for biases.
                if getattr(layer, "relative_bias", None) is not None:
                    assert layer.graph_bound(norm=norm, mask=mask) >= exact
                elif not isinstance(layer, kl.CenterNormalization):
                    assert layer.graph_bound(norm=norm, mask=mask) == exact


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_close_and_differentiable(norm):
    for layer in _layers("float64"):
        randomize(layer)
        with tf.GradientTape() as tape:
            bound = layer.graph_bound(norm=norm)
        # One scaling of the heads, and for CenterNormalization the largest entry of gamma.
        assert float(bound) <= 1.5 * layer.lipschitz(norm=norm).value
        weights = [weight.value for weight in layer.trainable_variables]
        gradients = tape.gradient(bound, weights, unconnected_gradients="zero")
        assert all(np.isfinite(gradient).all() for gradient in gradients)
        if not getattr(layer, "spectral_norm", None):
            assert any(np.abs(gradient).max() > 0.0 for gradient in gradients)
