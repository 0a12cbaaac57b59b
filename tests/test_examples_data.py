"""The example's data: always the same, from this machine, in the stated units."""

import gzip
import io
import tarfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from image_data import digits_builder, load_images, local_files
from patch_transformer import Architecture, patch_transformer

RNG = np.random.default_rng(7)


def _splits(data):
    return (data.train, data.validation, data.test)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_images("digits", tmp_path_factory.mktemp("data"))


def test_digits_are_those_of_scikit_learn(digits):
    images, labels = load_digits(return_X_y=True)
    wanted = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    got = [
        ((digits_builder.WHITE * image.astype(np.float64)).tobytes(), int(label))
        for split in _splits(digits)
        for image, label in zip(*split, strict=True)
    ]
    # As many as there are, and each of them: no image is in two splits.
    assert len(got) == len(labels)
    assert set(got) == wanted


def test_digits_are_the_same_wherever_they_are_prepared(digits, tmp_path):
    again = load_images("digits", tmp_path)
    for split, other in zip(_splits(digits), _splits(again), strict=True):
        np.testing.assert_array_equal(split[0], other[0])
        np.testing.assert_array_equal(split[1], other[1])


def test_digits_are_prepared_once(tmp_path):
    load_images("digits", tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tfrecord*")}
    load_images("digits", tmp_path)
    assert files
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tfrecord*")}


def test_classes_are_in_proportion(digits):
    images, labels = digits.test
    assert images.shape == (360, 8, 8, 1)
    assert np.bincount(labels, minlength=10).min() >= 34


@pytest.mark.parametrize("white", [16, 255])
def test_pixels_are_in_the_unit_interval(white, tmp_path, monkeypatch):
    if white == 255:
        arrays = {
            f"{kind}_{split}": RNG.integers(0, 256, (20, 28, 28)[: 3 if kind == "x" else 1])
            for kind in "xy"
            for split in ("train", "test")
        }
        arrays["x_train"][0, 0, :2] = 0, 255
        np.savez(tmp_path / "mnist.npz", allow_pickle=False, **arrays)
        monkeypatch.setenv("LIPATTN_DATA", str(tmp_path))
    data = load_images("digits" if white == 16 else "mnist", tmp_path)
    for images, labels in _splits(data):
        assert images.dtype == np.float32
        assert labels.dtype == np.int64
        assert images.shape[-1] == 1
        assert len(images) == len(labels)
        assert 0.0 <= images.min() <= images.max() <= 1.0
    assert data.train[0].min() == 0.0
    assert data.train[0].max() == 1.0


def test_mnist_comes_from_the_local_file(lipattn_data, tmp_path, monkeypatch):
    if not (lipattn_data / "mnist.npz").is_file():
        pytest.skip("LIPATTN_DATA holds no mnist.npz")
    monkeypatch.setenv("LIPATTN_DATA", str(lipattn_data))
    data = load_images("mnist", tmp_path)
    assert [len(images) for images, _ in _splits(data)] == [54000, 6000, 10000]
    assert not any(tmp_path.iterdir())


def _write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files_read_back(tmp_path, monkeypatch):
    wanted = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        images = RNG.integers(0, 256, (5, 4, 3), np.uint8)
        labels = RNG.integers(0, 10, (5,), np.uint8)
        _write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        _write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
        wanted[split] = images, labels
    monkeypatch.setattr(local_files, "FASHION_MNIST_FOLDER", tmp_path)
    got = local_files.find_local("fashion_mnist")
    assert got is not None
    for split, arrays in wanted.items():
        for array, other in zip(arrays, got[split], strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        b"\0\0\x0d\x01" + bytes(4),
        b"\0\0\x08\x02" + bytes(8),
        b"\0\0\x08\x03" + bytes(4),
        b"\0\0\x08\x01" + np.array([5], ">i4").tobytes() + bytes(4),
    ],
    ids=["empty", "short", "floats", "matrix", "no shape", "cut"],
)
def test_a_file_that_is_no_idx_file_is_refused(content, tmp_path):
    path = tmp_path / "broken.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"must (be|hold).*Received: .*broken"):
        local_files.read_idx(path)


def test_without_a_local_copy_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    monkeypatch.delenv("LIPATTN_DATA", raising=False)
    assert local_files.find_local("mnist") is None
    assert local_files.find_local("fashion_mnist") is None
    monkeypatch.setenv("LIPATTN_DATA", str(tmp_path))
    assert local_files.find_local("mnist") is None


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Received: dataset='letters'"):
        load_images("letters", tmp_path)


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match=r"must tile.*Received: .*patch=3"):
        patch_transformer((8, 8, 1), 10, Architecture(patch=3))


def test_patches_hold_neighboring_pixels():
    model = patch_transformer((4, 6, 1), 10, Architecture(patch=2))
    patches = keras.Model(model.input, model.get_layer("patches").output)
    image = np.arange(24.0).reshape(1, 4, 6, 1)
    wanted = [
        image[0, row : row + 2, column : column + 2, 0].ravel()
        for row in (0, 2)
        for column in (0, 2, 4)
    ]
    np.testing.assert_array_equal(patches.predict(image, verbose=0)[0], wanted)


def test_images_of_an_archive_keep_their_classes(tmp_path, monkeypatch):
    wanted = {"train": (6, {"cat": 90, "dog": 200}), "test": (2, {"cat": 90, "dog": 200})}
    with tarfile.open(tmp_path / "cifar10_jpegs.tar.xz", "w:xz") as archive:
        for split, (count, classes) in wanted.items():
            for name, gray in classes.items():
                for number in range(count):
                    image = np.full((32, 32, 3), gray, np.uint8)
                    content = tf.io.encode_jpeg(image).numpy()
                    member = tarfile.TarInfo(f"{split}/{name}/{number:04d}.jpg")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    monkeypatch.setenv("LIPATTN_DATA", str(tmp_path))
    got = local_files.find_local("cifar10")
    assert got is not None
    for split, (count, _) in wanted.items():
        images, classes = got[split]
        assert images.shape == (2 * count, 32, 32, 3)
        assert np.bincount(classes).tolist() == [count, count]
        # JPEG keeps a gray image up to roundings.
        assert np.abs(images.mean(axis=(1, 2, 3)) - np.array([90, 200])[classes]).max() <= 2.0
