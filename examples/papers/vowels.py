"""The Japanese Vowels series: 270 and 370 utterances of 12 channels and 7 to 29 steps.

The data are inside the wheel of `aeon` (BSD), which need not be importable: install it with
`pip install --no-deps aeon==1.6.0`.

Reference:
    Kudo, Toyama, Shimbo, "Multidimensional curve classification using passing-through regions",
    1999; UCI machine learning repository, "Japanese Vowels".
"""

import importlib.util
import pathlib

import numpy as np

LENGTH, CHANNELS = 29, 12


def load() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The series, each channel standardised by the valid steps of the training part.

    Returns:
        `"train"` and `"test"`: series `(n, 29, 12)`, zero after their end, masks `(n, 29)`, and the
        number of the speaker, 0 to 8, `(n,)`.

    Raises:
        FileNotFoundError: If the package with the data is not installed.
    """
    found = importlib.util.find_spec("aeon")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "The Japanese Vowels series come with the package aeon: "
            "pip install --no-deps aeon==1.6.0. Received: no package named aeon"
        )
    folder = pathlib.Path(found.origin).parent / "datasets" / "data" / "JapaneseVowels"
    parts = {
        name: parse((folder / f"JapaneseVowels_{name.upper()}.ts").read_text())
        for name in ("train", "test")
    }
    series, mask, _ = parts["train"]
    mean, deviation = series[mask].mean(axis=0), series[mask].std(axis=0)
    return {
        name: (
            np.where(mask[..., None], (series - mean) / deviation, 0.0).astype("float32"),
            mask,
            speakers,
        )
        for name, (series, mask, speakers) in parts.items()
    }


def parse(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Series `(n, 29, 12)`, masks `(n, 29)` and classes `(n,)` of a file in the `.ts` format.

    Each line after `@data` has the channels between colons, the last field being the class from 1.
    """
    lines = text.partition("@data")[2].split()
    series = np.zeros((len(lines), LENGTH, CHANNELS))
    mask = np.zeros((len(lines), LENGTH), bool)
    classes = np.zeros(len(lines), np.int64)
    for index, line in enumerate(lines):
        *channels, last = line.split(":")
        classes[index] = int(last) - 1
        values = np.array([channel.split(",") for channel in channels], np.float64).T
        series[index, : len(values)] = values
        mask[index, : len(values)] = True
    return series, mask, classes
