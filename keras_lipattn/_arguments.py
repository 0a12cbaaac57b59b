"""Checks of arguments, whose errors end with what was received."""

import math
import numbers

import numpy as np

from keras_lipattn.bounds.lipschitz_bound import NORMS


def describe(tensor):
    shape = getattr(tensor, "shape", None)
    return type(tensor).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


def as_tuple(name, value):
    """An integer or a sequence of integers as a tuple; an empty one counts as `None`."""
    if value is None:
        return None
    items = (value,) if isinstance(value, int | np.integer) else value
    if not isinstance(items, list | tuple) or not all(
        isinstance(item, int | np.integer) for item in items
    ):
        raise ValueError(
            f"`{name}` must be an integer or a tuple of integers. Received: {name}={value}"
        )
    return tuple(int(item) for item in items) or None


def require_positive_integer(name, value, *, optional=False):
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value}")


def require_positive(name, value, *, optional=True):
    if optional and value is None:
        return
    if not (_is_real(value) and math.isfinite(value) and value > 0):
        alternative = " or `None`" if optional else ""
        raise ValueError(
            f"`{name}` must be a positive number{alternative}. Received: {name}={value}"
        )


def require_nonnegative(name, value):
    if not (_is_real(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be zero or a positive number. Received: {name}={value}")


def require_probability(name, value):
    if not (_is_real(value) and 0.0 <= value < 1.0):
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value}")


def require_norm(name, value):
    if not isinstance(value, str) or value not in NORMS:
        raise ValueError(f"`{name}` must be one of {sorted(NORMS)}. Received: {name}={value!r}")


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
