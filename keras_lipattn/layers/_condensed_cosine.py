"""The constants a scaled cosine attention layer runs with when condensed."""

import numpy as np

from keras_lipattn.layers._condensed_weights import CondensedWeights
from keras_lipattn.layers._operator_norms import quiet


class CondensedCosine(CondensedWeights):
    """Kernels by head, which are rounded."""

    def __init__(self, layer):
        super().__init__(layer)
        with quiet():
            self._kernels = [
                kernel.astype(self._dtype)
                for kernel in layer._capped(layer._host_kernels(), self._norms, np)
            ]

    def kernels(self, visibility):
        """Query, key and value kernels `(H, D, .)`; the output's `(H, v, O)` with its factor."""
        *projections, output = self._kernels
        with quiet():
            output = output * np.asarray(self.factor(visibility), self._dtype)
            return *projections, self._layer._rounded(output, np)

    def _matrices(self):
        *projections, output = self._kernels
        return {
            "condensed_projection": self._layer._projection(projections, np),
            "condensed_output": output.reshape(-1, output.shape[-1]),
        }

    def _layer_factor(self, visibility):
        kernels = [kernel.astype(np.float64) for kernel in self._kernels]
        return self._layer._layer_factor(kernels, self._norms, visibility, np)
