"""Products with the Jacobian of a function, from numpy to numpy.

All come from one product with the transposed Jacobian, `vector_jacobian`, which is differentiable
and exists for every backend of Keras. No Jacobian is ever formed.
"""

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
        output: What the function returns, for its shape and dtype.
    """

    def __init__(self, function: Any, dtype: str, output: Any):
        self.dtype = dtype
        self.output_shape = tuple(output.shape)
        self.output_dtype = keras.backend.standardize_dtype(output.dtype)

        def pull(x, covector):
            return vector_jacobian(function, x, covector)

        def push(x, direction):
            # The transpose of the map `covector -> J(x)^T covector`, which is linear.
            zero = ops.zeros(self.output_shape, self.output_dtype)
            return vector_jacobian(lambda covector: pull(x, covector), zero, direction)

        def slope(x, covector, direction):
            return vector_jacobian(lambda point: pull(point, covector), x, direction)

        self._pull, self._push, self._slope = map(_compiled, (pull, push, slope))

    def pull(self, x: np.ndarray, covector: np.ndarray) -> np.ndarray:
        """`J(x)^T covector`."""
        return _array(self._pull(self._input(x), self._output(covector)))

    def push(self, x: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """`J(x) direction`."""
        return _array(self._push(self._input(x), self._input(direction)))

    def slope(self, x: np.ndarray, covector: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Gradient in `x` of `<covector, J(x) direction>`."""
        return _array(self._slope(self._input(x), self._output(covector), self._input(direction)))

    def _input(self, array):
        return ops.convert_to_tensor(array, self.dtype)

    def _output(self, array):
        return ops.convert_to_tensor(array, self.output_dtype)


def _compiled(function):
    """The function traced once, where the backend has it: many steps use it."""
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
