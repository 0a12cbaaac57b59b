"""The penalty and the bounds do not depend on the number of replicas."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import monitor_fits

TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def one_replica():
    results, _ = monitor_fits.record()
    return results


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory):
    # A collective that aborts poisons its process: strategies run in one of their own.
    path = tmp_path_factory.mktemp("mirrored") / "record.npz"
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "mirrored_fit.py"), str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    with np.load(path) as record:
        assert record["replicas"] == 2
        return dict(record)


def test_gradient_of_the_penalty_is_the_same_with_two_replicas(one_replica, two_replicas):
    assert np.abs(one_replica["gradient"]).max() > 0.01
    # Float32, reduced over two replicas.
    np.testing.assert_allclose(
        two_replicas["gradient"], one_replica["gradient"], rtol=1e-5, atol=1e-6
    )


def test_training_is_the_same_with_two_replicas(one_replica, two_replicas):
    assert set(two_replicas) == {*one_replica, "replicas", "apart"}
    for name, values in one_replica.items():
        # Float32 roundoff, accumulated over twelve steps.
        np.testing.assert_allclose(two_replicas[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_replicas_keep_the_same_running_vectors(two_replicas):
    # They compute the same from the same weights.
    assert two_replicas["apart"] == 0.0
