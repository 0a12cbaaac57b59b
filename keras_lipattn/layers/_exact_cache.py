"""Exact operator norms remembered for the very weights they were computed from."""

import keras
import numpy as np
from keras import ops

from keras_lipattn.layers._operator_norms import CACHE_ALLOWANCE


class ExactCache:
    """Norms of a layer's matrices, valid while its kernels are bitwise those they were taken of.

    A kernel which was trained, loaded or assigned since compares unequal, and the graph falls back
    to Gram iteration: soundness never rests on somebody remembering to refresh the cache. The
    variables are not weights of the layer: checkpoints stay as they are.

    Args:
        shapes: Shapes of the kernels.
        size: Number of norms.
        dtype: Dtype of the norms and of the kernels as they are handed over.
    """

    def __init__(self, shapes, size, dtype):
        # Nothing equals NaN, so a cache that was never filled never matches.
        self._snapshots = [_untracked(shape, np.nan, dtype) for shape in shapes]
        self._norms = _untracked((size,), 0.0, dtype)

    def fill(self, kernels, norms):
        """Remembers `norms` for `kernels`, tensors as they run."""
        for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
            snapshot.assign(kernel)
        self._norms.assign(np.asarray(norms) * CACHE_ALLOWANCE)

    def select(self, kernels, fallback):
        """The remembered norms if they are those of `kernels`, else `fallback()`, as a vector."""
        same = True
        for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
            same = ops.logical_and(same, ops.all(ops.equal(snapshot.value, kernel)))
        return ops.cond(same, lambda: ops.convert_to_tensor(self._norms.value), fallback)


def _untracked(shape, value, dtype):
    # By an initializer: a layer may be built where no variable can have its value yet.
    fill = keras.initializers.Constant(value)
    return keras.Variable(fill, shape=shape, dtype=dtype, trainable=False, autocast=False)
