"""Certificates, lower estimates and training give on this backend what they give on TensorFlow."""

import numpy as np
import pytest
from shared import cases


@pytest.fixture(scope="module")
def here():
    return cases.record()


def test_certificates_are_the_same(here, tensorflow_side):
    found, expected = here["certificates"], tensorflow_side["certificates"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Certificates are float64 on the host, whatever the backend: only numpy's threads differ.
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_lower_estimates_agree(here, tensorflow_side):
    found, expected = here["estimates"], tensorflow_side["estimates"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The same search in float32: rounding may send an ascent elsewhere, not to other heights.
        np.testing.assert_allclose(found[name], value, rtol=0.02, err_msg=name)


def test_training_goes_the_same_way(here, tensorflow_side):
    found, expected = here["histories"], tensorflow_side["histories"]
    assert found.keys() == expected.keys()
    for name, history in expected.items():
        assert found[name].keys() == history.keys()
        for key, values in history.items():
            # Six float32 steps of a model without chaos in it.
            np.testing.assert_allclose(found[name][key], values, rtol=1e-4, err_msg=f"{name} {key}")
