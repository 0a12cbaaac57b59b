"""The operator norms a layer's bound is fed with in a graph: running, Gram, or exact from a cache.

Each is a callable `(name, matrix) -> norm`, the argument which the formulas of `bounds/` take, so
that one formula serves training, inference and the certificate.
"""

import numpy as np
from keras import ops

from keras_lipattn.linalg.exact import fast_operator_norm
from keras_lipattn.linalg.gram import converged_upper_bound, gram_upper_bound
from keras_lipattn.linalg.power import power_step, warm_vector

# Host and graph evaluate scalings and factors in different precisions: a relative 1e-6 covers the
# float32 roundings between a cached norm and the matrix the graph multiplies with.
CACHE_ALLOWANCE = 1.0 + 1e-6


def quiet():
    """Context for host arithmetic on weights that may overflow or hold NaN.

    Those stay so and are reported by the certificate: a warning would only come first.
    """
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


class RunningNorms:
    """One power step on each matrix asked for; `commit` stores the new vectors."""

    def __init__(self, vectors):
        self._vectors = vectors
        self._norms = {}
        self._moved = {}

    def __call__(self, name, matrix):
        return self._norm(name, matrix)

    def scaled(self, name, matrix, scales, axis):
        """The norm of `matrix` with its rows (`axis=-2`) or columns (`-1`) scaled."""
        return self._norm(name, matrix, **{{-2: "rows", -1: "columns"}[axis]: scales})

    def _norm(self, name, matrix, **scales):
        if name not in self._norms:
            vector = ops.cast(ops.convert_to_tensor(self._vectors[name]), matrix.dtype)
            self._norms[name], self._moved[name] = power_step(matrix, vector, **scales)
        return self._norms[name]

    def commit(self):
        for name, vector in self._moved.items():
            self._vectors[name].assign(ops.cast(vector, self._vectors[name].dtype))


class WarmNorms:
    """Running vectors for weights never seen before, on the host, with the norms they see."""

    def __init__(self):
        self.vectors = {}
        self._norms = {}

    def __call__(self, name, matrix):
        if name not in self.vectors:
            self.vectors[name] = warm_vector(matrix)
            image = np.matmul(matrix, self.vectors[name][..., None])
            self._norms[name] = np.linalg.norm(image[..., 0], axis=-1)
        return self._norms[name]


class ExactNorms:
    """Norms on the host, in float64, each computed once: exact, or above by 1e-9 at most."""

    def __init__(self):
        self.norms = {}

    def __call__(self, name, matrix):
        if name not in self.norms:
            self.norms[name] = fast_operator_norm(matrix)
        return self.norms[name]


class GramNorms:
    """Upper bounds, whatever the weights."""

    _bound = staticmethod(gram_upper_bound)

    def __init__(self):
        self.norms = {}

    def __call__(self, name, matrix):
        if name not in self.norms:
            self.norms[name] = self._bound(matrix)
        return self.norms[name]


class ConvergedNorms(GramNorms):
    """Upper bounds that exceed the norms by about one part in 10^7, in float64, to be remembered.

    They are as good as exact, so a cap does not depend on how its norm was found.
    """

    _bound = staticmethod(converged_upper_bound)


class RecordedNorms:
    """Norms found before, looked up by name in one flat vector."""

    def __init__(self, flat, layout):
        self._flat = flat
        self._slices = layout.slices

    def __call__(self, name, matrix):
        start, size, batched = self._slices[name]
        return self._flat[start : start + size] if batched else self._flat[start]


class NormLayout:
    """Where each named norm sits in a flat vector; batches of matrices take one place each."""

    def __init__(self, shapes):
        self.slices = {}
        start = 0
        for name, shape in shapes.items():
            batched = len(shape) == 3
            size = shape[0] if batched else 1
            self.slices[name] = (start, size, batched)
            start += size
        self.size = start

    def flatten(self, norms, xp):
        return xp.concatenate([xp.reshape(norms[name], (-1,)) for name in self.slices])
