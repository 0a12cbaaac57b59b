"""Interpolation of images without rounding, so that an attack measures only the function."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import numpy as np
import tensorflow as tf


@contextlib.contextmanager
def interpolation_in_float64() -> Iterator[None]:
    """Lets `tf.image.resize` return the exact linear map of float64 images.

    TensorFlow interpolates in float32 for every dtype and rounds each pixel `p` by about
    `6e-8 |p|`, however small the step of an attack is. A difference quotient of a step `h` is then
    wrong by up to `1.2e-7 |p| / |h|` of the constant. Inside, pixels of float64 are multiplied in
    float64 by the float32 weights that TensorFlow returns for images of one pixel, which leaves the
    weights under attack and takes the rounding away. Other dtypes, and the nearest pixel, which is
    not rounded, are left to TensorFlow.
    """
    rounding = tf.image.resize

    @functools.cache
    def weights(sizes: tuple, size: tuple, options: tuple) -> np.ndarray:
        """Weights of all pixels of the output, `(rows * columns, *size)`."""
        pixels = int(np.prod(sizes))
        basis = np.eye(pixels, dtype=np.float32).reshape(pixels, *sizes, 1)
        return np.asarray(rounding(basis, size, **dict(options)), np.float64)[..., 0]

    def resize(images, size, **options):
        images = tf.convert_to_tensor(images)
        if images.dtype != tf.float64 or options.get("method") == "nearest":
            return rounding(images, size, **options)
        rows, columns, channels = tf.unstack(tf.shape(images)[-3:])
        matrix = weights((int(rows), int(columns)), tuple(size), tuple(sorted(options.items())))
        pixels = tf.reshape(images, (*tf.shape(images)[:-3], rows * columns, channels))
        return tf.einsum("...pc,pHW->...HWc", pixels, matrix)

    with mock.patch.object(tf.image, "resize", resize):
        yield
