"""Results cached by the contents of arrays, and products that are computed in fewer steps."""

import gc

import ml_dtypes
import numpy as np
import pytest

from keras_lipattn.certification import linear_map
from keras_lipattn.linalg import cached_by_content, computed_from


class Counted:
    """A function of an array that counts its calls."""

    def __init__(self):
        self.calls = 0
        # The name of the cache: one for each object.
        self.__qualname__ = f"Counted{id(self)}"

    def __call__(self, array):
        self.calls += 1
        return float(array.sum())


def test_equal_contents_are_computed_once():
    total = Counted()
    for array in (np.ones((3, 2)), np.ones((3, 2)), np.asfortranarray(np.ones((3, 2)))):
        assert cached_by_content(total, array) == 6.0
    assert total.calls == 1
    cached_by_content(total, np.ones((2, 3)))
    cached_by_content(total, np.ones((3, 2), np.float32))
    assert total.calls == 3


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, bool, np.int8])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_any_dtype_and_shape_has_a_content(dtype, shape):
    total = Counted()
    for _ in range(2):
        assert cached_by_content(total, np.ones(shape, dtype)) == np.prod(shape)
    assert total.calls == 1
    assert cached_by_content(total, np.zeros(shape, dtype)) == 0.0
    assert total.calls == (1 if 0 in shape else 2)


def test_what_an_array_was_computed_from_stands_for_its_content():
    total = Counted()
    kernel = np.arange(6.0)
    for factor, calls in ((2.0, 1), (2.0, 1), (3.0, 2)):
        product = computed_from(factor * kernel, "product", factor, kernel)
        assert cached_by_content(total, product) == 15.0 * factor
        assert total.calls == calls
    nested = computed_from(product + 1.0, "plus one", product)
    again = computed_from(product + 1.0, "plus one", product)
    assert cached_by_content(total, nested) == cached_by_content(total, again) == 51.0
    assert total.calls == 3


def test_an_array_that_changes_is_read_again():
    total = Counted()
    array = np.arange(4.0)
    assert cached_by_content(total, array) == 6.0
    array[0] = 10.0
    assert cached_by_content(total, array) == 16.0
    known = computed_from(array)
    assert cached_by_content(total, known) == 16.0
    with pytest.raises(ValueError, match="read-only"):
        known[0] = 0.0
    known.setflags(write=True)
    known[0] = 0.0
    assert cached_by_content(total, known) == 6.0


def test_a_freed_array_leaves_nothing_to_another_one_at_its_place():
    total = Counted()
    for number in range(200):
        array = computed_from(np.full(3, float(number)))
        assert cached_by_content(total, array) == 3.0 * number
        del array
        gc.collect(0)
        array = np.full(3, -1.0 - number)
        assert cached_by_content(total, array) == -3.0 * (1 + number)


def centering(gamma):
    width = len(gamma)
    return width / max(width - 1.0, 1.0) * (np.diag(gamma) - gamma[None, :] / width)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 40])
def test_products_with_centerings_are_the_products(width):
    rng = np.random.default_rng(width)
    wide, tall = rng.normal(size=(width, 7)), rng.normal(size=(7, width))
    squares = [
        rng.normal(size=(width, width)),
        np.eye(width),
        np.ones((width, width)),
        centering(rng.normal(size=width)),
        centering(np.ones(width)),
        np.zeros((width, width)),
    ]
    # One entry away from a centering, at every place.
    for place in np.ndindex(width, width):
        off = centering(np.ones(width))
        off[place] += 1.0
        squares.append(off)
    for square in squares:
        # Rounding of sums of so many terms of size 1.
        for first, second in ((square, wide), (tall, square)):
            product = linear_map.compose(first, second)
            assert product is not None
            np.testing.assert_allclose(product, first @ second, rtol=0.0, atol=1e-13 * width)
