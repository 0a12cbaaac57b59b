"""A sequence of invertible layers, with the inverse of their composition."""

import math

import keras
from keras import ops

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.layers._branch import composed
from keras_lipattn.layers.inversion import Inversion, LogDeterminant


@keras.saving.register_keras_serializable(package="keras_lipattn")
class InvertibleSequential(keras.layers.Layer):
    """A sequence of invertible layers, for example an invertible Transformer.

    Args:
        layers: `InvertibleResidual` layers, or other layers with the methods `inverse`,
            `log_det_jacobian`, `lipschitz` and `inverse_lipschitz` and the properties `norm`,
            `inverse_constant` and `max_sequence_length`. All have the same `norm`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., features)`.

    Raises:
        ValueError: If `layers` is empty, a layer has no inverse, or norms or dtypes differ.

    Example:

    >>> blocks = [
    ...     InvertibleResidual(branch)
    ...     for branch in (L2MultiHeadAttention(4, 16), SpectralDense(64, activation="tanh"))
    ... ]
    >>> flow = InvertibleSequential(blocks)
    >>> x = keras.random.normal((2, 10, 64))
    >>> inversion = flow.inverse(flow(x))
    >>> float(keras.ops.max(keras.ops.abs(inversion.solution - x))) < 1e-5
    True
    """

    def __init__(self, layers, **kwargs):
        super().__init__(**kwargs)
        if not layers:
            raise ValueError(f"`layers` must hold at least one layer. Received: layers={layers}")
        for layer in layers:
            if not (hasattr(layer, "inverse") and hasattr(layer, "log_det_jacobian")):
                raise ValueError(
                    "Every layer needs the methods `inverse` and `log_det_jacobian`. "
                    f"Received: layer {layer.name!r} of class {type(layer).__name__}"
                )
            if layer.compute_dtype != self.compute_dtype:
                raise ValueError(
                    f"Every layer must have the compute dtype of the sequence, "
                    f"{self.compute_dtype}. "
                    f"Received: layer {layer.name!r} with compute dtype {layer.compute_dtype!r}"
                )
        norms = sorted({layer.norm for layer in layers})
        if len(norms) > 1:
            raise ValueError(f"All layers must have the same `norm`. Received: {norms}")
        self.supports_masking = True
        self.layers = list(layers)

    @property
    def norm(self):
        """Norm in which the layers contract."""
        return self.layers[0].norm

    @property
    def inverse_constant(self):
        """Lipschitz constant of the inverse in the norm `norm`, for all weights."""
        return math.prod(layer.inverse_constant for layer in self.layers)

    @property
    def max_sequence_length(self):
        """Largest number of tokens that all layers accept, or `None` before it is known."""
        lengths = [layer.max_sequence_length for layer in self.layers]
        return None if None in lengths else min(lengths)

    def build(self, input_shape):
        for layer in self.layers:
            if not layer.built:
                layer.build(input_shape)

    def call(self, inputs, mask=None):
        for layer in self.layers:
            inputs = layer(inputs, mask=mask)
        return inputs

    def inverse(self, outputs, mask=None, **options):
        """Solve `layer(x) = outputs`, starting with the last layer.

        Args:
            outputs: Tensor `(B, ..., D)`.
            mask: Boolean `(B, ...)`, false where a token is padding.
            **options: See `InvertibleResidual.inverse`.

        Returns:
            An `Inversion`. Its error bound holds for the composition: the inverses of the earlier
            layers magnify the error of a later one.

        Raises:
            InversionError: See `InvertibleResidual.inverse`.
        """
        mask = _mask_of(outputs, mask)
        *earlier, last = self.layers
        found = last.inverse(outputs, mask, **options)
        for layer in reversed(earlier):
            found = _then(found, layer.inverse(found.solution, mask, **options), layer)
        return found

    def log_det_jacobian(self, inputs, mask=None, **options):
        """`log |det|` of the Jacobian of the composition.

        Args:
            inputs: Tensor `(B, ..., D)`.
            mask: Boolean `(B, ...)`, false where a token is padding.
            **options: See `InvertibleResidual.log_det_jacobian`. `tolerance` applies to each
                layer.

        Returns:
            A `LogDeterminant`. Its truncation error is the sum of those of the layers.
        """
        mask = _mask_of(inputs, mask)
        values, errors = [], []
        for index, layer in enumerate(self.layers):
            part = layer.log_det_jacobian(inputs, mask, **options)
            values.append(part.value)
            errors.append(part.truncation_error)
            if index + 1 < len(self.layers):
                inputs = layer(inputs, mask=mask)
        return LogDeterminant(sum(values), sum(errors))

    def lipschitz(self, sequence_length=None, norm="l2", mask="full") -> LipschitzBound:
        """Certified Lipschitz constant, the product of those of the layers.

        Args:
            sequence_length: See `InvertibleResidual.lipschitz`.
            norm: See `InvertibleResidual.lipschitz`.
            mask: See `InvertibleResidual.lipschitz`.

        Returns:
            A `LipschitzBound`.
        """
        return composed([layer.lipschitz(sequence_length, norm, mask) for layer in self.layers])

    def inverse_lipschitz(self, norm="l2") -> LipschitzBound:
        """Certified Lipschitz constant of the inverse, the product of those of the layers.

        Args:
            norm: See `InvertibleResidual.lipschitz`.

        Returns:
            A `LipschitzBound`.
        """
        return composed([layer.inverse_lipschitz(norm) for layer in reversed(self.layers)])

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.layers]
        return {**super().get_config(), "layers": layers}

    @classmethod
    def from_config(cls, config):
        layers = [keras.saving.deserialize_keras_object(layer) for layer in config["layers"]]
        return cls(**{**config, "layers": layers})


def _mask_of(tensor, mask):
    # The Keras mask is on the first tensor only; intermediate results do not carry it.
    return getattr(tensor, "_keras_mask", None) if mask is None else mask


def _then(found, step, layer):
    """The `Inversion` of several layers, where `step` is that of `layer`, the next one inverted."""
    return Inversion(
        solution=step.solution,
        residual=ops.maximum(found.residual, step.residual),
        error_bound=step.error_bound + layer.inverse_constant * found.error_bound,
        steps=found.steps + step.steps,
        converged=ops.logical_and(found.converged, step.converged),
    )
