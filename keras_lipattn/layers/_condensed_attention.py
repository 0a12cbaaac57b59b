"""The constants an L2 attention layer runs with when condensed."""

import numpy as np

from keras_lipattn.layers._condensed_weights import CondensedWeights
from keras_lipattn.layers._operator_norms import quiet


class CondensedAttention(CondensedWeights):
    """Kernels folded to `B` and `C`, which are rounded."""

    def __init__(self, layer):
        super().__init__(layer)
        self.biases = None if layer.relative_bias is None else layer._bias_table(np)
        with quiet():
            kernels = layer._host_kernels()
            self.kernels = layer._capped(kernels, self._norms, np)
            _, *self._exact = layer._fold(kernels, self._norms, np)
            self._b, self._c = (matrix.astype(self._dtype) for matrix in self._exact)

    def heads(self, visibility):
        """`B_h` `(H, D, K)` and `C_h` `(H, K, O)` with the layer's factor."""
        with quiet():
            c = self._c * np.asarray(self.factor(visibility), self._dtype)
            return self._b, self._layer._rounded(c, np)

    def _matrices(self):
        heads, features, key_dim = self._b.shape
        return {
            "condensed_query": self._b.transpose(1, 0, 2).reshape(features, heads * key_dim),
            "condensed_output": self._c.reshape(heads * key_dim, -1),
        }

    def _layer_factor(self, visibility):
        b, c = (m.astype(np.float64) for m in (self._b, self._c))
        return self._layer._layer_factor(b, c, self._norms, visibility, np)

    def product_scale(self, visibility):
        """`(H,)`, what `C_h` with its factor may have cancelled from.

        That is `|B_h| |W_V,h| |W_O,h|` in Frobenius norm.
        """
        _, value, output = self.kernels
        with quiet():
            sizes = [
                np.linalg.norm(matrix.astype(np.float64), axis=(1, 2))
                for matrix in (self._b, value, output)
            ]
            return np.prod(sizes, axis=0) * self.factor(visibility)

    def rounding(self, visibility):
        """How far `heads` are from the exact products that run when not condensed.

        A pair of arrays `(H,)`, in Frobenius norm: of `B_h` and of `C_h` with its factor.
        """
        exact_b, exact_c = self._exact
        b, c = self.heads(visibility)
        with quiet():
            exact_c = self._layer._rounded(exact_c * self.factor(visibility), np)
            return tuple(
                np.linalg.norm(rounded - exact, axis=(1, 2))
                for rounded, exact in ((b, exact_b), (c, exact_c))
            )
