"""Images in [0, 1] with their classes, split for training, validation and test."""

import dataclasses
import os

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from image_data.digits_builder import WHITE, Digits
from image_data.local_files import find_local

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
_VALIDATION_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Pairs of images `(n, height, width, channels)` in [0, 1], float32, and classes `(n,)`, int64.

    Attributes:
        train: What is learned from.
        validation: The last tenth of the training images, never learned from.
        test: Only looked at after training.
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load_images(dataset: str, data_dir: str | os.PathLike) -> ImageData:
    """Loads a data set, from this machine where it has it.

    Args:
        dataset: `"digits"` (shipped with scikit-learn), `"mnist"`, `"fashion_mnist"` or `"cifar10"`
            (local files first, see `find_local`, then a download by tensorflow-datasets).
        data_dir: Folder for what tensorflow-datasets prepares.

    Returns:
        An `ImageData`; the same arrays on every call.

    Raises:
        ValueError: If the data set is unknown.
    """
    if dataset not in DATASETS:
        raise ValueError(f"`dataset` must be one of {DATASETS}. Received: dataset={dataset!r}")
    arrays = find_local(dataset)
    white = 255
    if arrays is None and dataset == "digits":
        builder = Digits(data_dir=os.fspath(data_dir))
        builder.download_and_prepare()
        arrays, white = _from_builder(builder), WHITE
    elif arrays is None:
        logging.warning(
            "No copy of %s on this machine (MNIST and CIFAR-10: mnist.npz and cifar10_jpegs.tar.xz "
            "in the folder named by LIPATTN_DATA; Fashion-MNIST: Debian's package "
            "dataset-fashion-mnist): downloading it",
            dataset,
        )
        builder = tfds.builder(dataset, data_dir=os.fspath(data_dir))
        builder.download_and_prepare()
        arrays = _from_builder(builder)
    images, classes = _normalized(*arrays["train"], white)
    kept = len(images) - round(_VALIDATION_SHARE * len(images))
    return ImageData(
        train=(images[:kept], classes[:kept]),
        validation=(images[kept:], classes[kept:]),
        test=_normalized(*arrays["test"], white),
    )


def _from_builder(builder: tfds.core.DatasetBuilder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    # One batch: whole arrays, in the order of the files.
    return {
        split: tfds.as_numpy(
            builder.as_dataset(split=split, batch_size=-1, shuffle_files=False, as_supervised=True)
        )
        for split in ("train", "test")
    }


def _normalized(images: np.ndarray, classes: np.ndarray, white: int):
    images = images.reshape(*images.shape[:3], -1).astype(np.float32) / white
    return images, classes.astype(np.int64)
