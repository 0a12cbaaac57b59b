"""Smoke tests of the installed package. `test_packaging.py` runs them against the wheel."""

import importlib.metadata
import os
import pathlib

import keras
import numpy as np
import pytest

import keras_lipattn as kl


def batch(size=8):
    random = np.random.default_rng(0)
    return random.normal(size=(size, 6, 8)).astype("float32"), np.arange(size) % 3


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((6, 8))
    x = kl.layers.CenterNormalization()(inputs)
    x = kl.layers.L2MultiHeadAttention(2, 4, lipschitz_bound=1.0)(x)
    x = keras.layers.GlobalAveragePooling1D()(kl.layers.Residual(alpha=0.5)([inputs, x]))
    model = keras.Model(inputs, kl.layers.SpectralDense(3)(x))
    model.compile(
        "adam",
        kl.losses.MarginCrossentropy(radius=0.1),
        metrics=[kl.metrics.CertifiedAccuracy(radius=0.1)],
    )
    history = model.fit(*batch(), verbose=0, callbacks=[kl.callbacks.LipschitzMonitor()])
    assert {"certified_accuracy", "lipschitz_total"} <= set(history.history)
    return model


def test_the_installed_package_is_the_one_imported():
    folder = pathlib.Path(kl.__file__).parent
    assert folder.parent == pathlib.Path(os.environ["KERAS_LIPATTN_SITE"])
    assert (folder / "py.typed").exists()
    assert importlib.metadata.version("keras-lipattn") == kl.__version__


@pytest.mark.parametrize(
    "name", ["callbacks", "certification", "distribution", "layers", "losses", "metrics"]
)
def test_namespaces_have_what_they_list(name):
    namespace = getattr(kl, name)
    assert namespace.__all__ and all(hasattr(namespace, member) for member in namespace.__all__)


def test_a_model_is_certified_and_estimates_stay_below(model):
    certificate = kl.certify(model)
    assert certificate.is_finite
    # Float32 derivatives.
    estimate = kl.estimate_lipschitz(model, batch()[0], steps=5, restarts=1)
    assert estimate.value <= certificate.total * (1.0 + 1e-5)


def test_a_model_is_saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(batch()[0]), model(batch()[0]))


def test_a_model_is_exported_with_its_certificate(model, tmp_path):
    kl.export_saved_model(model, tmp_path / "served", verbose=False)
    (path,) = tmp_path.glob("served/1/assets.extra/certificate.json")
    certificate = kl.Certificate.from_json(path.read_text())
    assert certificate.is_finite and certificate.matches(model)


def test_attention_is_converted():
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs))
    assert kl.certify(kl.convert_attention(model).model).is_finite
