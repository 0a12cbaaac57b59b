"""What the tests of a backend share: the backend, the cases of `tests/helpers`, TensorFlow's side.

They run under `KERAS_BACKEND=jax` or `torch`, in an environment without TensorFlow. What TensorFlow
says of the same weights comes from a process of the project's own environment.
"""

import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests_backends")]

import keras
import pytest
from shared import tensorflow_process


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes every test independent of those that ran before it."""
    keras.utils.set_random_seed(20240229)


@pytest.fixture(scope="session")
def tensorflow_side(tmp_path_factory):
    """What TensorFlow makes of the cases of `shared.cases`."""
    return tensorflow_process.run("record", tmp_path_factory.mktemp("tensorflow"))
