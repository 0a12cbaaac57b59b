"""What attention layers run with when condensed: a matrix before attention and one after it."""

import keras
import numpy as np

from keras_lipattn.layers._operator_norms import ExactNorms, quiet


class CondensedWeights:
    """The weights a layer runs with: capped with exact norms on the host and rounded once.

    The certificate is computed from these very arrays: what is served is what is certified. A
    subclass gives the `_matrices` of a graph by name, the output's last, and `_layer_factor`.
    """

    def __init__(self, layer):
        self._layer = layer
        self._dtype = layer._norm_dtype
        self._norms = ExactNorms()
        self.variables = []

    def _matrices(self):
        raise NotImplementedError(f"{type(self).__name__} must implement `_matrices`.")

    def _layer_factor(self, visibility):
        """The factor of `lipschitz_bound` in float64."""
        raise NotImplementedError(f"{type(self).__name__} must implement `_layer_factor`.")

    def materialize(self):
        """Creates the variables of a condensed graph."""
        self.variables = [
            keras.Variable(matrix, dtype=self._dtype, trainable=False, autocast=False, name=name)
            for name, matrix in self._matrices().items()
        ]

    def tensors(self, visibility):
        """The matrices `(D, N)` and `(N', O)` of a graph, the second with the layer's factor."""
        projection, output = self.variables
        factor = self.factor(visibility)
        return projection.value, output.value if factor == 1.0 else output.value * factor

    def factor(self, visibility):
        """What `lipschitz_bound` multiplies the output with."""
        with quiet():
            factor = float(self._layer_factor(visibility))
        # What is too small for the dtype loses digits there, or becomes zero, as graphs have it.
        return 0.0 if factor < np.finfo(self._dtype).tiny else factor


class HeldWeights:
    """The matrices of one call, for many with the same class of mask."""

    def __init__(self, projection, output):
        self._tensors = projection, output

    def tensors(self, visibility):
        return self._tensors
