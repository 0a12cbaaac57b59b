"""What the certified signature answers: class, margin and certified radius."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_lipattn.certification import Certificate
from keras_lipattn.export._ports import Port

# The last operations of the signature: a handful of float32 roundings, each below 1.2e-7.
_ROUNDED_DOWN = 1.0 - 1e-6
# Relative error of the Euclidean norm of a token in float32, generously.
_ROUNDING_OF_NORMS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifiedAnswer:
    """Turns logits into an answer, inside a TensorFlow graph.

    Args:
        certificate: Certificate of the model, of finite total.
        certified: The inputs which may be perturbed, as they are sent.
        embedded: The inputs of integers that are looked up; perturbed is what is found.
        largest_embedding: Largest Euclidean norm of a row of the tables they are looked up in.
        sequence_length: Largest size of the axis of an input that varies, or `None`.
        relative_error: `kappa` of the allowance.
    """

    certificate: Certificate
    certified: Sequence[Port]
    embedded: Sequence[Port]
    largest_embedding: float
    sequence_length: int | None
    relative_error: float

    @property
    def radius_name(self) -> str:
        """Name of the output with the radius, which says when it is not in units of the inputs."""
        return "embedding_radius" if self.embedded else "radius"

    def __call__(self, inputs: Mapping[str, Any], logits: Any) -> dict[str, Any]:
        """Outputs by name.

        Args:
            inputs: Tensors by the names of the ports.
            logits: Tensor `(batch, classes)`, or `(batch, 1)` for a model with one unit.
        """
        import tensorflow as tf

        z = logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
        allowance = self._allowance(inputs, z, tf)
        if self.certificate.head in ("sigmoid", "logit"):
            winner, margin, radius = self._by_sign(z, 0.5 * allowance, tf)
        else:
            winner, margin, radius = self._by_rank(z, allowance, tf)
        radius = tf.minimum(radius, self._room(inputs, z.dtype, tf))
        # Comparisons with NaN are false: what is not a number is not certified.
        valid = tf.logical_and(radius > 0.0, tf.reduce_all(tf.math.is_finite(z), axis=-1))
        valid = tf.logical_and(valid, self._of_certified_length(inputs, tf))
        zero = tf.zeros_like(radius)
        return {
            "logits": z,
            "class": winner,
            "margin": tf.where(tf.math.is_finite(margin), margin, zero),
            self.radius_name: tf.where(valid, radius * _ROUNDED_DOWN, zero),
        }

    def _by_sign(self, z, allowance, tf):
        z = z[:, 0]
        margin = tf.abs(z)
        speed = _rounded_up(self.certificate.total, z.dtype)
        return tf.cast(z > 0.0, tf.int64), margin, _ratio(margin - allowance, speed, tf)

    def _by_rank(self, z, allowance, tf):
        classes = z.shape[-1]
        winner = tf.argmax(z, axis=-1, output_type=tf.int64)
        own = tf.one_hot(winner, classes, on_value=True, off_value=False, dtype=tf.bool)
        lead = tf.reduce_max(z, axis=-1, keepdims=True) - z
        infinite = tf.fill(tf.shape(z), tf.constant(math.inf, z.dtype))
        lead = tf.where(own, infinite, lead)
        if self.certificate.pairwise_constants:
            pairs = _rounded_up(np.asarray(self.certificate.pairwise_constants), z.dtype)
            speed = tf.gather(tf.constant(pairs), winner)
        else:
            factor = 2.0 if self.certificate.norm == "linf" else math.sqrt(2.0) * (1.0 + 1e-9)
            speed = _rounded_up(self.certificate.total * factor, z.dtype)
        # Not on the winner itself, whose constant with itself is 0.
        radii = tf.where(own, infinite, _ratio(lead - allowance[:, None], speed, tf))
        return winner, tf.reduce_min(lead, axis=-1), tf.reduce_min(radii, axis=-1)

    def _allowance(self, inputs, z, tf):
        """See the module `_allowance` for the formula."""
        size = tf.maximum(tf.constant(1.0, z.dtype), tf.reduce_max(tf.abs(z), axis=-1))
        reach = _rounded_up(self.certificate.total, z.dtype) * self._input_norm(inputs, z.dtype, tf)
        return _rounded_up(2.0 * self.relative_error, z.dtype) * (size + reach)

    def _input_norm(self, inputs, dtype, tf):
        """Norm of each example, in the norm of the certificate; of all inputs side by side."""
        norms = []
        for port in self.certified:
            x = tf.abs(tf.cast(inputs[port.name], dtype))
            if self.certificate.norm == "linf":
                norms.append(_largest(x, tf))
            elif self.certificate.norm == "token":
                norms.append(_largest(_token_norms(x, tf), tf))
            else:
                norms.append(tf.norm(tf.reshape(x, (tf.shape(x)[0], -1)), axis=-1))
        for port in self.embedded:
            shape = tf.shape(inputs[port.name])
            tokens = tf.cast(tf.reduce_prod(shape[1:]), dtype)
            scale = tf.sqrt(tokens) if self.certificate.norm == "l2" else tf.ones_like(tokens)
            norms.append(tf.fill(shape[:1], scale * tf.constant(self.largest_embedding, dtype)))
        stacked = tf.stack(norms)
        if self.certificate.norm == "l2":
            return tf.norm(stacked, axis=0)
        return tf.reduce_max(stacked, axis=0)

    def _room(self, inputs, dtype, tf):
        """Distance to the edge of the ball that the tokens must stay in: 0 and less outside."""
        limit = self.certificate.threat_model.input_radius
        if math.isinf(limit):
            return tf.constant(math.inf, dtype)
        rooms = []
        for port in self.certified:
            x = tf.cast(inputs[port.name], dtype)
            largest = _largest(_token_norms(x, tf), tf)
            room = limit * (1.0 - _ROUNDING_OF_NORMS) - largest * (1.0 + _ROUNDING_OF_NORMS)
            if self.certificate.norm == "linf" and x.shape.rank > 1:
                # A token moves by at most sqrt(size) times its largest entry.
                room /= math.sqrt(x.shape[-1]) * (1.0 + _ROUNDING_OF_NORMS)
            rooms.append(room)
        return tf.reduce_min(tf.stack(rooms), axis=0)

    def _of_certified_length(self, inputs, tf):
        if self.sequence_length is None:
            return tf.constant(True)
        sizes = [
            tf.shape(inputs[port.name])[axis]
            for port in (*self.certified, *self.embedded)
            for axis in port.dynamic_axes
        ]
        if self.certificate.threat_model.shapes:
            # Code of the model ran at this length: at another one it may do something else.
            return tf.reduce_all([size == self.sequence_length for size in sizes] or [True])
        return tf.reduce_all([size <= self.sequence_length for size in sizes] or [True])


def _ratio(margin, speed, tf):
    """`margin / speed`; infinite where nothing moves, and 0 or less where there is no margin."""
    return tf.where(margin > 0.0, margin / speed, tf.minimum(margin, 0.0))


def _largest(x, tf):
    """Largest entry of each example, 0 where it has none."""
    flat = tf.reshape(x, (tf.shape(x)[0], -1))
    return tf.maximum(tf.reduce_max(flat, axis=-1), tf.constant(0.0, x.dtype))


def _token_norms(x, tf):
    return tf.norm(x, axis=-1) if x.shape.rank > 1 else tf.abs(x)


def _rounded_up(value, dtype):
    """The number or array in a dtype, never smaller than it was."""
    target = dtype.as_numpy_dtype
    with np.errstate(over="ignore"):
        rounded = np.asarray(value, np.float64).astype(target)
    short = rounded.astype(np.float64) < value
    return np.where(short, np.nextafter(rounded, target(np.inf)), rounded).astype(target)
