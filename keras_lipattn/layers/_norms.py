"""Sources of operator norms: running, upper bounds in a graph, exact on the host, or remembered.

A layer declares the matrices whose norms its bound needs, by name. `measure` turns a function that
makes them into a dictionary of norms, which is what the formulas of `bounds/` take. One formula
serves training, inference and the certificate.
"""

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_lipattn.layers._backend import has_value
from keras_lipattn.linalg.exact import fast_operator_norm
from keras_lipattn.linalg.gram import converged_upper_bound, gram_upper_bound
from keras_lipattn.linalg.power import MatrixProduct, ScaledMatrix, power_step, warm_vector

# Host and graph evaluate scalings and factors in different precisions: a relative 1e-6 covers the
# float32 roundings between a remembered norm and the matrix the graph multiplies with.
CACHE_ALLOWANCE = 1.0 + 1e-6


def ignore_floating_point_errors():
    """Context for host arithmetic on weights that may overflow or hold NaN.

    The certificate reports such weights. A warning of numpy would only come first.
    """
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


class Norms:
    """Operator norms by name, each measured once."""

    def __init__(self):
        self.norms = {}

    def measure(self, matrices):
        """Norms of named matrices.

        Args:
            matrices: Function that returns a dictionary of matrices, or of batches of them.

        Returns:
            Dictionary with the norm of each, a scalar, or `(H,)` for a batch.
        """
        named = matrices()
        for name, matrix in named.items():
            if name not in self.norms:
                self.norms[name] = self._measure(name, matrix)
        return {name: self.norms[name] for name in named}

    def _measure(self, name, matrix):
        raise NotImplementedError(f"{type(self).__name__} must implement `_measure`.")


class RunningNorms(Norms):
    """Estimates by one power step on each matrix; `commit` stores the new vectors."""

    def __init__(self, vectors):
        super().__init__()
        self._vectors = vectors
        self._next = {}

    def _measure(self, name, matrix):
        vector = ops.cast(ops.convert_to_tensor(self._vectors[name]), matrix.dtype)
        norm, self._next[name] = power_step(matrix, vector)
        return norm

    def commit(self):
        for name, vector in self._next.items():
            self._vectors[name].assign(ops.cast(vector, self._vectors[name].dtype))


class WarmNorms(Norms):
    """Estimates on the host after many power steps, and the vectors they ended with."""

    def __init__(self):
        super().__init__()
        self.vectors = {}

    def _measure(self, name, matrix):
        matrix = _formed(matrix, np)
        self.vectors[name] = warm_vector(matrix)
        image = np.matmul(matrix, self.vectors[name][..., None])
        return np.linalg.norm(image[..., 0], axis=-1)


class ExactNorms(Norms):
    """Norms on the host in float64: exact, or at most 1e-9 above."""

    def _measure(self, name, matrix):
        return fast_operator_norm(_formed(matrix, np))


class GramNorms(Norms):
    """Upper bounds in a graph, for all weights."""

    def _measure(self, name, matrix):
        return gram_upper_bound(_formed(matrix, ops))


class ConvergedNorms(Norms):
    """Upper bounds in a graph, in float64, about one part in 10^7 above the norms.

    They are as good as exact, so a cap does not depend on how its norm was found.
    """

    def _measure(self, name, matrix):
        return converged_upper_bound(_formed(matrix, ops))


class RecordedNorms:
    """Norms that were found before. The matrices are not made."""

    def __init__(self, flat, layout):
        self._norms = {
            name: flat[start : start + size] if batched else flat[start]
            for name, (start, size, batched) in layout.slices.items()
        }

    def measure(self, matrices):
        return self._norms


def _formed(matrix, xp):
    return matrix.formed(xp) if isinstance(matrix, ScaledMatrix | MatrixProduct) else matrix


class NormLayout:
    """Position of each named norm in one flat vector; a batch of matrices takes one entry each."""

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


class WeightCache:
    """What a layer computes from its kernels, valid while they are bitwise the same.

    It comes from the host, or from the first call after a kernel was trained, loaded or assigned:
    that call finds a kernel that compares unequal, and computes it. Both agree to one part in
    10^6. Soundness never depends on a refresh of the cache. The variables are not weights of the
    layer, so they are not part of checkpoints.

    Args:
        kernel_shapes: Shapes of the kernels.
        shape: Shape of what is remembered.
        dtype: Dtype of it and of the kernels as they are given.
    """

    def __init__(self, kernel_shapes, shape, dtype):
        # Nothing equals NaN, so a cache that was never filled never matches.
        self._snapshots = [_untracked(shape, np.nan, dtype) for shape in kernel_shapes]
        self._value = _untracked(shape, 0.0, dtype)

    def fill(self, kernels, value):
        """Remembers `value` for `kernels`, tensors of the norm dtype."""
        for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
            # A copy: JAX gives the memory of weights to the next step.
            snapshot.assign(ops.copy(kernel))
        self._value.assign(value)

    def select(self, kernels, bounds, exact):
        """The remembered value if it is that of `kernels`, else a newly computed one.

        On TensorFlow a new value is remembered, except in a stateless scope, where no variable may
        be written. Derivatives are those of `bounds` either way. On other backends functions are
        pure, and what is remembered is constant.

        Args:
            kernels: Tensors of the norm dtype.
            bounds: Differentiable function of kernels, used on backends other than TensorFlow.
            exact: Function of kernels in float64, as good as exact, used on TensorFlow.
        """

        if keras.backend.backend() != "tensorflow":
            hit, value = self._remembers(kernels), ops.convert_to_tensor(self._value.value)
            if has_value(hit):
                # Outside of a traced function JAX would compile both branches anew in every call.
                return value if hit else bounds(*kernels)
            return ops.cond(hit, lambda: value, lambda: bounds(*kernels))
        import tensorflow as tf

        def converged():
            # All of it in float64, as on the host.
            double = [ops.cast(kernel, "float64") for kernel in kernels]
            return ops.cast(exact(*double), self._value.dtype)

        def remember():
            found = converged()
            # The kernels last: another thread that finds them equal finds their value.
            with tf.control_dependencies([self._value.value.assign(found)]):
                for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
                    snapshot.value.assign(kernel)
            return found

        @tf.custom_gradient
        def value(*kernels):
            def gradient(upstream):
                with tf.GradientTape() as tape:
                    tape.watch(kernels)
                    found = bounds(*kernels)
                return tape.gradient(found, kernels, upstream, tf.UnconnectedGradients.ZERO)

            if in_stateless_scope():
                return converged(), gradient
            hit = self._remembers(kernels)
            known = tf.cond(hit, lambda: tf.convert_to_tensor(self._value.value), remember)
            return known, gradient

        return value(*kernels)

    def remembered(self, kernels):
        """The remembered value as an array if it is that of `kernels`, else `None`."""
        if not bool(ops.convert_to_numpy(self._remembers(kernels))):
            return None
        return ops.convert_to_numpy(self._value.value).astype(np.float64)

    def _remembers(self, kernels):
        same = True
        for snapshot, kernel in zip(self._snapshots, kernels, strict=True):
            same = ops.logical_and(same, ops.all(ops.equal(snapshot.value, kernel)))
        return same


def _untracked(shape, value, dtype):
    # By an initializer: a layer may be built where no variable can have its value yet.
    fill = keras.initializers.Constant(value)
    return keras.Variable(fill, shape=shape, dtype=dtype, trainable=False, autocast=False)
