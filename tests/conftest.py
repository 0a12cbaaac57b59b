"""What every test shares: a quiet CPU runtime of two devices, seeds, the optional data."""

import os

# Set before numpy and TensorFlow start. One thread each: parallel test workers share the cores.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
for _name in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
):
    os.environ.setdefault(_name, "1")

import pathlib

import keras
import pytest
import tensorflow as tf


def pytest_configure() -> None:
    """Splits the CPU in two logical devices, as strategies need, before TensorFlow starts."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes every test independent of those that ran before it."""
    keras.utils.set_random_seed(20240229)


@pytest.fixture(scope="session")
def two_cpus() -> list[str]:
    """Names of the two logical CPU devices, for `tf.distribute.MirroredStrategy`."""
    return [device.name for device in tf.config.list_logical_devices("CPU")]


@pytest.fixture(scope="session")
def lipattn_data() -> pathlib.Path:
    """The folder of optional data sets that the environment variable LIPATTN_DATA names."""
    name = os.environ.get("LIPATTN_DATA")
    if not name:
        pytest.skip("LIPATTN_DATA is not set: it names the folder with mnist.npz")
    folder = pathlib.Path(name)
    if not folder.is_dir():
        pytest.skip(f"LIPATTN_DATA is not a folder. Received: {name}")
    return folder
