"""Products with the Jacobian of a function, from numpy to numpy.

All are built from one product with the transposed Jacobian, `vector_jacobian`, which is
differentiable and exists for every backend of Keras. The Jacobian itself is never formed.
"""

import contextlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn.layers._autodiff import vector_jacobian


class Derivatives:
    """Derivatives of a function of one tensor, in a floating dtype.

    Args:
        function: From a tensor `(B, ...)` to a tensor `(B, ...)`.
        dtype: Dtype of the input.
        output: An output of `function`, which gives the shape and dtype.
    """

    def __init__(self, function: Any, dtype: str, output: Any):
        self.dtype = dtype
        self.output_shape = tuple(output.shape)
        self.output_dtype = keras.backend.standardize_dtype(output.dtype)

        def vjp(x, covector):
            return vector_jacobian(function, x, covector)

        def jvp(x, direction):
            # The transpose of the map `covector -> J(x)^T covector`, which is linear.
            zero = ops.zeros(self.output_shape, self.output_dtype)
            return vector_jacobian(lambda covector: vjp(x, covector), zero, direction)

        def jvp_gradient(x, covector, direction):
            return vector_jacobian(lambda point: vjp(point, covector), x, direction)

        self._vjp, self._jvp, self._jvp_gradient = map(_compiled, (vjp, jvp, jvp_gradient))

    def vjp(self, x: np.ndarray, covector: np.ndarray) -> np.ndarray:
        """`J(x)^T covector`."""
        return _array(self._vjp(self._input(x), self._output(covector)))

    def jvp(self, x: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """`J(x) direction`."""
        return _array(self._jvp(self._input(x), self._input(direction)))

    def jvp_gradient(self, x: np.ndarray, covector: np.ndarray, direction: np.ndarray):
        """Gradient with respect to `x` of `<covector, J(x) direction>`."""
        tensors = self._input(x), self._output(covector), self._input(direction)
        return _array(self._jvp_gradient(*tensors))

    def _input(self, array):
        return ops.convert_to_tensor(array, self.dtype)

    def _output(self, array):
        return ops.convert_to_tensor(array, self.output_dtype)


@contextlib.contextmanager
def preserve_losses(function: Any):
    """Restores the losses of the last call of a layer, which Keras clears at the next one."""
    layers = function._flatten_layers() if isinstance(function, keras.layers.Layer) else []
    losses = [(inner, list(inner._losses), set(inner._loss_ids)) for inner in layers]
    try:
        yield
    finally:
        for inner, values, ids in losses:
            inner._losses[:] = values
            inner._loss_ids.clear()
            inner._loss_ids.update(ids)


def _compiled(function):
    """Traces the function once, on backends with graphs: it runs many times."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    if backend == "jax":
        import jax  # pyright: ignore[reportMissingImports]

        return jax.jit(function)
    return function


def _array(tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor), np.float64)
