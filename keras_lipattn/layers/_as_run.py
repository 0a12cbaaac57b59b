"""Weights on the host, as they enter the computation."""

import numpy as np
from keras import ops


def as_run(weight, dtype):
    """A variable or array as float64 numpy, rounded to the dtype a layer computes in."""
    value = getattr(weight, "value", weight)
    return ops.convert_to_numpy(ops.cast(value, dtype)).astype(np.float64)


def is_finite_as_run(weight, dtype):
    """Whether every entry is a finite number in that dtype; true for `None`."""
    return weight is None or bool(np.isfinite(as_run(weight, dtype)).all())
