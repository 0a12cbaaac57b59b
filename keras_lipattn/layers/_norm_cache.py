"""Operator norms remembered for the weights they were computed from."""

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_lipattn.layers._eager import has_value
from keras_lipattn.layers._operator_norms import CACHE_ALLOWANCE, ConvergedNorms, GramNorms


class NormCache:
    """Norms of a layer's matrices, valid while its kernels are bitwise those they were taken of.

    They come from the host, or from the first call since a kernel was trained, loaded or assigned:
    that call sees a kernel which compares unequal, and computes them. Both agree to one part in
    10^6. Soundness never rests on a refresh of the cache. The variables are not weights of the
    layer: checkpoints stay as they are.

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
        """Remembers `norms` for `kernels`, tensors of the norm dtype."""
        for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
            snapshot.assign(kernel)
        self._norms.assign(norms)

    def select(self, kernels, evaluate):
        """The remembered norms if they are those of `kernels`, else what `evaluate` finds.

        On TensorFlow the latter are remembered in turn, except in a stateless scope, where no
        variable may be written. Derivatives are those of Gram iteration either way. Elsewhere
        functions are pure, and what is remembered is constant.

        Args:
            kernels: Tensors of the norm dtype.
            evaluate: Function of a source of norms and of kernels; returns the vector of norms.
        """

        def bounds(*kernels):
            return evaluate(GramNorms(), kernels)

        if keras.backend.backend() != "tensorflow":
            hit, norms = self._remembers(kernels), ops.convert_to_tensor(self._norms.value)
            if has_value(hit):
                # Outside of a traced function JAX would compile both branches anew in every call.
                return norms if hit else bounds(*kernels)
            return ops.cond(hit, lambda: norms, lambda: bounds(*kernels))
        import tensorflow as tf

        def converged():
            # The whole of it in float64, as on the host.
            double = [ops.cast(kernel, "float64") for kernel in kernels]
            found = evaluate(ConvergedNorms(), double) * CACHE_ALLOWANCE
            return ops.cast(found, self._norms.dtype)

        def remember():
            found = converged()
            # The kernels last: another thread which finds them equal finds their norms.
            with tf.control_dependencies([self._norms.value.assign(found)]):
                for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
                    snapshot.value.assign(kernel)
            return found

        @tf.custom_gradient
        def norms(*kernels):
            def gradient(upstream):
                with tf.GradientTape() as tape:
                    tape.watch(kernels)
                    found = bounds(*kernels)
                return tape.gradient(found, kernels, upstream, tf.UnconnectedGradients.ZERO)

            if in_stateless_scope():
                return converged(), gradient
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
