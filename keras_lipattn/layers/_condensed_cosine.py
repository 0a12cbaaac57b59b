"""The constants a scaled cosine attention layer runs with when condensed."""

import keras
import numpy as np

from keras_lipattn.layers._operator_norms import ExactNorms, quiet


class CondensedCosine:
    """The weights a layer runs with: capped with exact norms on the host and rounded once.

    The certificate is computed from these very arrays: what is served is what is certified.
    """

    def __init__(self, layer):
        self._layer = layer
        self._dtype = layer._norm_dtype
        self._norms = ExactNorms()
        with quiet():
            self._kernels = [
                kernel.astype(self._dtype)
                for kernel in layer._capped(layer._host_kernels(), self._norms, np)
            ]
        self.variables = []

    def kernels(self, visibility):
        """Query, key and value kernels `(H, D, .)`; the output's `(H, v, O)` with its factor."""
        *projections, output = self._kernels
        with quiet():
            output = output * np.asarray(self._factor(visibility), self._dtype)
            return *projections, self._layer._rounded(output, np)

    def materialize(self):
        """Creates the variables of a condensed graph."""
        *projections, output = self._kernels
        matrices = {
            "condensed_projection": self._layer._projection(projections, np),
            "condensed_output": output.reshape(-1, output.shape[-1]),
        }
        self.variables = [
            keras.Variable(matrix, dtype=self._dtype, trainable=False, autocast=False, name=name)
            for name, matrix in matrices.items()
        ]

    def tensors(self, visibility):
        """The matrices `(D, H*(2*k+v))` and `(H*v, O)` of a graph."""
        projection, output = self.variables
        factor = self._factor(visibility)
        return projection.value, output.value if factor == 1.0 else output.value * factor

    def _factor(self, visibility):
        """What `lipschitz_bound` multiplies the output with."""
        kernels = [kernel.astype(np.float64) for kernel in self._kernels]
        with quiet():
            factor = float(self._layer._layer_factor(kernels, self._norms, visibility, np))
        # What is too small for the dtype loses digits there, or becomes zero, as graphs have it.
        return 0.0 if factor < np.finfo(self._dtype).tiny else factor
