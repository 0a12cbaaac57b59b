"""The weights a layer runs with, as values: tensors of a graph, or arrays on the host."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lipattn.layers._norms import ExactNorms, ignore_floating_point_errors


@dataclass(frozen=True)
class EffectiveWeights:
    """The matrices that run in a call: capped, folded, in the norm dtype.

    Training makes them from running norms, inference from remembered norms or upper bounds, a
    condensed layer from exact norms. `call_with_weights` uses them without knowing which.

    Attributes:
        projection: Tensor `(D, N)` before attention; `None` for a layer of one matrix.
        output: Tensor `(M, O)`, the last matrix.
        relative_bias: Biases by relative position, or `None`.
    """

    projection: Any
    output: Any
    relative_bias: Any = None


class HostWeights:
    """The weights of inference, made on the host: capped with exact norms and rounded once.

    The certificate is computed from these arrays, and a condensed layer runs with them.

    Attributes:
        kernels: The kernels in float64, without caps.
        factors: The factors of `spectral_norm`, one for each kernel.
        exact: Result of `fold` in float64.
        rounded: The same in the norm dtype, as a condensed graph holds it.
        relative_bias: Biases by relative position in float64, or `None`.
        variables: The variables of a condensed graph.
    """

    def __init__(self, layer):
        self._layer = layer
        self._dtype = layer._norm_dtype
        self.variables = []
        self.relative_bias = layer.score_biases(np)
        with ignore_floating_point_errors():
            self.kernels = layer.host_kernels()
            self.factors = layer._cap_factors(self.kernels, ExactNorms(), np)
            self.exact = layer.fold(self.kernels, self.factors, np)
            self.rounded = _cast(self.exact, self._dtype)
        # Of the rounded weights, once for all masks.
        self._norms = ExactNorms()

    def factor(self, mask):
        """The factor of `lipschitz_bound` for a class of mask, from the rounded weights."""
        with ignore_floating_point_errors():
            weights = _cast(self.rounded, np.float64)
            factor = float(self._layer._layer_factor(weights, self._norms, mask, np))
        # Flush subnormal factors to zero, as the graph does.
        return 0.0 if factor < np.finfo(self._dtype).tiny else factor

    def weights(self, mask=None):
        """The weights that run: the rounded ones, with the factor in `output`, rounded again."""
        with ignore_floating_point_errors():
            output = self.rounded.output * np.asarray(self.factor(mask), self._dtype)
            return self.rounded._replace(output=self._layer._rounded(output, np))

    def materialize(self):
        """Creates the variables of a condensed graph."""
        output = self.rounded.output
        matrices = {
            "condensed_projection": self.rounded.projection,
            "condensed_output": output.reshape(matrix_shape(output)),
        }
        self.variables = [
            keras.Variable(matrix, dtype=self._dtype, trainable=False, autocast=False, name=name)
            for name, matrix in matrices.items()
            if matrix is not None
        ]

    def tensors(self, mask):
        """`EffectiveWeights` of a condensed graph."""
        *projection, output = [variable.value for variable in self.variables]
        factor = self.factor(mask)
        return EffectiveWeights(
            projection[0] if projection else None,
            output if factor == 1.0 else output * factor,
            self.relative_bias,
        )


def matrix_shape(output):
    """Shape `(M, O)` of an output kernel `(M, O)`, or by heads, `(H, k, O)`."""
    return (math.prod(output.shape[:-1]), output.shape[-1])


def _cast(weights, dtype):
    return type(weights)(
        *(None if array is None else np.asarray(array).astype(dtype) for array in weights)
    )
