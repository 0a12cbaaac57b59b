"""scikit-learn's handwritten digits as a tensorflow-datasets builder that needs no network."""

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# Gray levels are 0 to 16.
WHITE = 16
_TEST_IMAGES = 360
_SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 images of handwritten digits, 8 by 8, split once and for all."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "1,437 training and 360 test images, classes in proportion."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=(
                "The test part of the Optical Recognition of Handwritten Digits data, as shipped "
                "with scikit-learn: 8 by 8 pixels with gray levels from 0 to 16."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=(
                "@misc{alpaydin1998optical, author={Alpaydin, E. and Kaynak, C.}, year={1998}, "
                "title={Optical Recognition of Handwritten Digits}, publisher={UCI}}"
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
        numbers = np.arange(len(images))
        train, test = train_test_split(
            numbers, test_size=_TEST_IMAGES, random_state=_SPLIT_SEED, stratify=labels
        )
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, numbers: np.ndarray):
        for number in numbers:
            yield int(number), {"image": images[number], "label": int(labels[number])}
