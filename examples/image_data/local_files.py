"""MNIST, Fashion-MNIST and CIFAR-10 from files that are already on this machine."""

import gzip
import os
import pathlib
import tarfile

import numpy as np
import tensorflow as tf

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
_MAGIC = {1: 0x801, 3: 0x803}


def read_npz(path: pathlib.Path) -> Arrays:
    """Reads `x_train`, `y_train`, `x_test`, `y_test` of a file such as `mnist.npz`.

    Args:
        path: The file.

    Returns:
        Images `(n, height, width)` and labels `(n,)` of the splits `"train"` and `"test"`.
    """
    with np.load(path, allow_pickle=False) as arrays:
        return {split: (arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test")}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a compressed IDX file of bytes.

    Args:
        path: The file.

    Returns:
        An array of `uint8`.

    Raises:
        ValueError: If the file is no IDX file of bytes, or is cut short.
    """
    content = gzip.decompress(path.read_bytes())
    rank = content[3] if len(content) >= 4 else 0
    header = np.frombuffer(content, ">i4", count=min(1 + rank, len(content) // 4))
    if rank not in _MAGIC or header[0] != _MAGIC[rank]:
        raise ValueError(f"The file must be an IDX file of bytes. Received: {path}")
    shape, start = header[1:], 4 * (1 + rank)
    if len(content) - start != np.prod(shape):
        raise ValueError(f"The file must hold an array of shape {tuple(shape)}. Received: {path}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_idx_folder(folder: pathlib.Path) -> Arrays:
    """Reads the four files of MNIST's original distribution.

    Args:
        folder: Where they are.

    Returns:
        As `read_npz`.
    """
    names = {"train": "train", "test": "t10k"}
    return {
        split: (
            read_idx(folder / f"{name}-images-idx3-ubyte.gz"),
            read_idx(folder / f"{name}-labels-idx1-ubyte.gz"),
        )
        for split, name in names.items()
    }


def read_jpeg_archive(path: pathlib.Path) -> Arrays:
    """Reads an archive of members `train/CLASS/NUMBER.jpg` and `test/CLASS/NUMBER.jpg`.

    Args:
        path: A tar file, compressed or not.

    Returns:
        As `read_npz`, with images `(n, height, width, 3)`. The classes are numbered in the order of
        their names, and the images are in a fixed random order.
    """
    found: dict[str, list] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".jpg"):
                split, name, _ = member.name.split("/")
                file = archive.extractfile(member)
                assert file is not None
                found[split].append((name, tf.io.decode_jpeg(file.read()).numpy()))
    arrays = {}
    for split, pairs in found.items():
        names, images = zip(*pairs, strict=True)
        _, classes = np.unique(names, return_inverse=True)
        order = np.random.default_rng(0).permutation(len(images))
        arrays[split] = (np.stack(images)[order], classes[order])
    return arrays


def find_local(dataset: str) -> Arrays | None:
    """Looks for a data set on this machine.

    Args:
        dataset: `"mnist"` or `"cifar10"`, looked for as `mnist.npz` or `cifar10_jpegs.tar.xz` in
            the folder that the environment variable LIPATTN_DATA names, or `"fashion_mnist"`,
            where Debian's package puts it.

    Returns:
        As `read_npz`, or `None` when there is no local copy.
    """
    if dataset in _FILES and os.environ.get("LIPATTN_DATA"):
        name, read = _FILES[dataset]
        path = pathlib.Path(os.environ["LIPATTN_DATA"]) / name
        return read(path) if path.is_file() else None
    if dataset == "fashion_mnist" and FASHION_MNIST_FOLDER.is_dir():
        return read_idx_folder(FASHION_MNIST_FOLDER)
    return None


_FILES = {
    "mnist": ("mnist.npz", read_npz),
    "cifar10": ("cifar10_jpegs.tar.xz", read_jpeg_archive),
}
