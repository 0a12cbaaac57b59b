"""Export is TensorFlow's: elsewhere the error tells the way round, and the way works."""

import keras
import numpy as np
import pytest
from helpers import monitor_models
from shared import cases, tensorflow_process

import keras_lipattn as kl


def test_the_error_tells_the_way_round(tmp_path):
    model = cases.with_weights(monitor_models.sequential())
    words = (
        r"save\('model\.keras'\).*KERAS_BACKEND=tensorflow.*load_model.*compile=False.*Received: "
    )
    with pytest.raises(RuntimeError, match=words + f".*'{keras.backend.backend()}'"):
        kl.export_saved_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_trained_here_is_certified_and_exported_there(tmp_path):
    model, history = cases.trained(monitor_models.capped)
    model.save(tmp_path / "model.keras")
    there = tensorflow_process.run(
        "export", tmp_path, tmp_path / "model.keras", tmp_path / "exported"
    )
    here = kl.certify(model).total
    np.testing.assert_allclose(there["certified"], here, rtol=1e-9)
    np.testing.assert_allclose(there["certified"], history["lipschitz_total"][-1], rtol=1e-9)
    # Of the exported constants, capped by the exact norms.
    np.testing.assert_allclose(there["exported"], here, rtol=1e-5)
    outputs = keras.ops.convert_to_numpy(model(cases.data()[0]))
    # Float32 on both sides, with other sums.
    np.testing.assert_allclose(there["outputs"], outputs, rtol=0, atol=2e-5)
    np.testing.assert_allclose(there["served"], outputs, rtol=0, atol=2e-5)
