"""The constants an L2 attention layer runs with when condensed."""

import keras
import numpy as np

from keras_lipattn.layers._operator_norms import ExactNorms, quiet


class CondensedAttention:
    """The weights a layer runs with: capped with exact norms on the host, folded, rounded once.

    The certificate is computed from these very arrays: what is served is what is certified.
    """

    def __init__(self, layer):
        self._layer = layer
        self._dtype = layer._norm_dtype
        self._norms = ExactNorms()
        with quiet():
            self.kernels = layer._capped(layer._host_kernels(), self._norms, np)
            self._exact = layer._fold(*self.kernels, np)
            self._b, self._c = (matrix.astype(self._dtype) for matrix in self._exact)
        self.variables = []

    def heads(self, visibility):
        """`B_h` `(H, D, K)` and `C_h` `(H, K, O)` with the layer's factor."""
        with quiet():
            c = self._c * np.asarray(self.factor(visibility), self._dtype)
            return self._b, self._layer._rounded(c, np)

    def materialize(self):
        """Creates the variables of a condensed graph."""
        heads, features, key_dim = self._b.shape
        matrices = {
            "condensed_query": self._b.transpose(1, 0, 2).reshape(features, heads * key_dim),
            "condensed_output": self._c.reshape(heads * key_dim, -1),
        }
        self.variables = [
            keras.Variable(matrix, dtype=self._dtype, trainable=False, autocast=False, name=name)
            for name, matrix in matrices.items()
        ]

    def tensors(self, visibility):
        """What `heads` returns, as the matrices `(D, H*K)` and `(H*K, O)` of a graph."""
        b, c = self.variables
        factor = self.factor(visibility)
        return b.value, (c.value if factor == 1.0 else c.value * factor)

    def factor(self, visibility):
        """What `lipschitz_bound` multiplies the output with."""
        b, c = (m.astype(np.float64) for m in (self._b, self._c))
        with quiet():
            factor = float(self._layer._layer_factor(b, c, self._norms, visibility, np))
        # What is too small for the dtype loses digits there, or becomes zero, as graphs have it.
        return 0.0 if factor < np.finfo(self._dtype).tiny else factor

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


class HeldAttention:
    """The matrices of one call, for many with the same class of mask."""

    def __init__(self, b, c):
        self._matrices = b, c

    def tensors(self, visibility):
        return self._matrices
