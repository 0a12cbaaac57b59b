"""Certificates of condensed models: caps are constants there, and more can be said."""

import keras
import numpy as np

import keras_lipattn as kl


def _capped_classifier():
    inputs = keras.Input((6,))
    x = kl.SpectralDense(8, spectral_norm=1.0)(inputs)
    x = kl.SpectralDense(8, spectral_norm=1.0)(x)
    model = keras.Model(inputs, kl.SpectralDense(3, spectral_norm=1.0)(kl.MaxMin()(x)))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) * 2.0 for w in model.get_weights()])
    return model


def _served_kernel(layer):
    """The matrix a dense layer multiplies with, read off its outputs."""
    size = layer.kernel.shape[0]
    zero = np.asarray(layer(np.zeros((1, size), "float32")), np.float64)
    return np.asarray(layer(np.eye(size, dtype="float32")), np.float64) - zero


def test_capped_kernels_that_follow_each_other_become_one_matrix_when_condensed():
    model = _capped_classifier()
    live = kl.certify(model)
    with kl.condensed(model):
        served = kl.certify(model)
        first, second, last = (_served_kernel(model.layers[i]) for i in (1, 2, 4))
    expected = np.linalg.norm(first @ second, 2) * np.linalg.norm(last, 2)
    # Kernels are read off float32 outputs.
    np.testing.assert_allclose(served.total, expected, rtol=1e-5)
    assert served.total < 0.99 * live.total


def test_radii_by_pair_of_classes_are_never_smaller_when_condensed():
    model = _capped_classifier()
    live = kl.certify(model)
    with kl.condensed(model):
        served = kl.certify(model)
    logits = model.predict(np.random.default_rng(1).normal(size=(50, 6)), verbose=0)
    assert served.pairwise_constants is not None
    assert (served.certified_radius(logits) >= live.certified_radius(logits)).all()
