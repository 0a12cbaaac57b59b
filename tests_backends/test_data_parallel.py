"""`keras.distribution.DataParallel` on JAX trains as one device does, penalties and bounds too."""

import keras
import numpy as np
import pytest
from shared import data_parallel

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Keras has this on JAX only"
)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return data_parallel.run(1, tmp_path_factory.mktemp("one") / "record.npz")


@pytest.mark.parametrize("devices", [2, 4])
def test_any_number_of_devices_trains_alike(devices, one, tmp_path):
    found = data_parallel.run(devices, tmp_path / "record.npz")
    assert found.keys() == one.keys()
    assert any(key.startswith("log running_") for key in one)
    for key, value in one.items():
        # 20 float32 steps; sums over a batch are taken in another order.
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_training_did_something(one):
    assert one["log loss"][-1] < one["log loss"][0] - 0.01
    assert one["log lipschitz_total"][-1] == one["certified"]
