"""Operator norms remembered for the very weights they were computed from."""

import keras
import numpy as np
from keras import ops

from keras_lipattn.layers._eager import has_value
from keras_lipattn.layers._operator_norms import CACHE_ALLOWANCE


class NormCache:
    """Norms of a layer's matrices, valid while its kernels are bitwise those they were taken of.

    They are exact ones from the host, or upper bounds from the first call since a kernel was
    trained, loaded or assigned: that call sees a kernel which compares unequal, and computes them.
    Soundness never rests on somebody remembering to refresh the cache. The variables are not
    weights of the layer: checkpoints stay as they are.

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

    def select(self, kernels, bounds):
        """The remembered norms if they are those of `kernels`, else `bounds(*kernels)`, a vector.

        On TensorFlow the latter are remembered in turn, and derivatives are those of `bounds`
        either way. Elsewhere functions are pure, and what is remembered is constant.
        """
        if keras.backend.backend() != "tensorflow":
            hit, norms = self._remembers(kernels), ops.convert_to_tensor(self._norms.value)
            if has_value(hit):
                # Outside of a traced function JAX would compile both branches anew in every call.
                return norms if hit else bounds(*kernels)
            return ops.cond(hit, lambda: norms, lambda: bounds(*kernels))
        import tensorflow as tf

        @tf.custom_gradient
        def norms(*kernels):
            def remember():
                # Without the allowance of `fill`: they come from this graph, roundings included.
                fresh = bounds(*kernels)
                # The kernels last: whoever finds them equal, on another thread, finds their norms.
                with tf.control_dependencies([self._norms.value.assign(fresh)]):
                    for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
                        snapshot.value.assign(kernel)
                return fresh

            def gradient(upstream):
                with tf.GradientTape() as tape:
                    tape.watch(kernels)
                    fresh = bounds(*kernels)
                return tape.gradient(fresh, kernels, upstream, tf.UnconnectedGradients.ZERO)

            hit = self._remembers(kernels)
            known = tf.cond(hit, lambda: tf.convert_to_tensor(self._norms.value), remember)
            return known, gradient

        return norms(*kernels)

    def remembered(self, kernels):
        """The remembered norms as an array if they are those of `kernels`, else `None`."""
        if not bool(ops.convert_to_numpy(self._remembers(kernels))):
            return None
        return ops.convert_to_numpy(self._norms.value).astype(np.float64)

    def _remembers(self, kernels):
        same = True
        for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
            same = ops.logical_and(same, ops.all(ops.equal(snapshot.value, kernel)))
        return same


def _untracked(shape, value, dtype):
    # By an initializer: a layer may be built where no variable can have its value yet.
    fill = keras.initializers.Constant(value)
    return keras.Variable(fill, shape=shape, dtype=dtype, trainable=False, autocast=False)
