"""The signature `certified` of a classifier: class, margin and certified radius of each example."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.certification import Certificate
from keras_lipattn.certification.classifier_head import without_activation
from keras_lipattn.certification.keras_models import call_specs
from keras_lipattn.certification.trace import Trace
from keras_lipattn.certification.traced_model import TracedModel
from keras_lipattn.certification.weights import cast_to_compute_dtype
from keras_lipattn.export.serving_graph import ServedInput, ServedModel

_LINEAR = (None, keras.activations.linear)
# Prefix in `ThreatModel.inputs` of what is certified from the lookup on.
_LOOKED_UP = "output of "
_CLASSES = {
    "softmax": "the class with the largest logit",
    "logits": "the class with the largest logit",
    "sigmoid": "1 where the logit is positive, that is where the sigmoid is above 1/2, else 0",
    "logit": "1 where the output, taken for a logit, is positive, else 0",
}
# For the last operations of the signature: a few float32 roundings, each below 1.2e-7.
_ROUNDED_DOWN = 1.0 - 1e-6
# Upper bound of the relative error of the Euclidean norm of a token in float32.
_ROUNDING_OF_NORMS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifiedSignature:
    """How a model answers with certified radii, or why it cannot.

    Args:
        served: The model and its inputs.
        certificate: Its certificate.
        missing: Why there is no such signature; empty if there is one.
        logits_unreachable: Whether it is missing because the certificate is about logits that
            cannot be computed apart from the activation after them.
        activation: The layer or operation whose activation is left out to get logits, or `None`.
        perturbed: The floating-point inputs that the certificate covers.
        embedded: The integer inputs that are looked up; their embeddings are perturbed.
        largest_embedding: Largest Euclidean norm of a row of the embedding tables.
    """

    served: ServedModel
    certificate: Certificate
    missing: str
    logits_unreachable: bool
    activation: Any
    perturbed: Sequence[ServedInput]
    embedded: Sequence[ServedInput]
    largest_embedding: float

    @property
    def radius_name(self) -> str:
        """Name of the output with the radius; it says if it is not in the units of the inputs."""
        return "embedding_radius" if self.embedded else "radius"

    def describe(self) -> dict[str, str]:
        """What the outputs mean, or why they are missing."""
        if self.missing:
            return {"missing": self.missing}
        spaces = [
            *(["inputs"] if self.perturbed else []),
            *(["embeddings"] if self.embedded else []),
        ]
        space = "the " + " and ".join(spaces)
        norm = self.certificate.norm
        return {
            "class": _CLASSES[self.certificate.head],
            "radius": (
                f"the class is the same for all {space} closer than this in the {norm} "
                f"norm ({NORMS[norm]}), in the units of {space}"
            ),
        }

    def trace(self, kappa: float) -> Any:
        """Trace the function behind the signature while the model is condensed.

        Args:
            kappa: Factor of the rounding allowance, see `relative_rounding_error`.

        Returns:
            A concrete function.
        """

        def certified(**tensors):
            return self.answer(tensors, self.served.call(tensors), kappa)

        with without_activation(self.activation):
            return self.served.trace(certified)

    def expected_logits(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of the Keras model on named arrays."""
        with without_activation(self.activation):
            (logits,) = self.served.predict(arrays).values()
        return logits

    def answer(self, inputs: Mapping[str, Any], logits: Any, kappa: float) -> dict[str, Any]:
        """Outputs of the signature, inside a TensorFlow graph.

        Args:
            inputs: Tensors by name.
            logits: Tensor `(batch, classes)`, or `(batch, 1)` for a model with one unit.
            kappa: Factor of the rounding allowance.

        Returns:
            Tensors by name.
        """
        import tensorflow as tf

        z = logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
        # From here on all numbers are finite: converters to other formats write a selection as a
        # product with its condition, where `0 * inf` is NaN.
        half = 0.5 * z.dtype.max
        finite = tf.clip_by_value(_replace_nan(z, 0.0, tf), -0.5 * half, 0.5 * half)
        # No margin is above the largest allowance.
        allowance = _replace_nan(self._allowance(inputs, finite, kappa, tf), half, tf)
        allowance = tf.minimum(allowance, half)
        if self.certificate.head in ("sigmoid", "logit"):
            winner, margin, radius = self._by_sign(finite, 0.5 * allowance, tf)
        else:
            winner, margin, radius = self._by_rank(finite, allowance, tf)
        for distance in self._distances_to_edge(inputs, z.dtype, tf):
            radius = tf.minimum(radius, distance)
        radius = tf.clip_by_value(_replace_nan(radius, 0.0, tf), 0.0, z.dtype.max)
        is_finite = _all_finite(z, tf)
        valid = tf.logical_and(is_finite, self._has_certified_length(inputs, tf))
        for entry in self.perturbed:
            if entry.is_floating:
                valid = tf.logical_and(valid, _all_finite(inputs[entry.name], tf))
        zero = tf.zeros_like(radius)
        return {
            "logits": z,
            "class": winner,
            "margin": tf.where(is_finite, margin, zero),
            self.radius_name: tf.where(valid, radius * _ROUNDED_DOWN, zero),
        }

    def _by_sign(self, z, allowance, tf):
        z = z[:, 0]
        margin = tf.abs(z)
        radius = _ratio(margin - allowance, self.certificate.total, tf)
        return tf.cast(z > 0.0, tf.int64), margin, radius

    def _by_rank(self, z, allowance, tf):
        winner = tf.argmax(z, axis=-1, output_type=tf.int64)
        own = tf.equal(tf.range(z.shape[-1], dtype=tf.int64), winner[:, None])
        # No other class is led by more.
        lead = tf.where(own, 0.5 * z.dtype.max, tf.reduce_max(z, axis=-1, keepdims=True) - z)
        if self.certificate.pairwise_constants:
            # The constant of a class with itself is 0, so its ratio is the largest.
            pairs = _rounded_up(np.asarray(self.certificate.pairwise_constants), z.dtype)
            speed = tf.gather(tf.constant(np.maximum(pairs, _tiny(z.dtype))), winner)
        else:
            factor = 2.0 if self.certificate.norm == "linf" else math.sqrt(2.0) * (1.0 + 1e-9)
            speed = self.certificate.total * factor
        radii = _ratio(lead - allowance[:, None], speed, tf)
        return winner, tf.reduce_min(lead, axis=-1), tf.reduce_min(radii, axis=-1)

    def _allowance(self, inputs, z, kappa, tf):
        """`2 kappa (L |x| + max(1, max|z|))`, derived in `relative_rounding_error`."""
        size = tf.maximum(tf.constant(1.0, z.dtype), tf.reduce_max(tf.abs(z), axis=-1))
        reach = _rounded_up(self.certificate.total, z.dtype) * self._input_norm(inputs, z.dtype, tf)
        return _rounded_up(2.0 * kappa, z.dtype) * (size + reach)

    def _input_norm(self, inputs, dtype, tf):
        """Norm of each example over all its inputs, in the norm of the certificate."""
        norms = []
        for entry in self.perturbed:
            x = tf.cast(inputs[entry.name], dtype)
            if self.certificate.norm == "linf":
                norms.append(_largest(tf.abs(x), tf))
            elif self.certificate.norm == "token":
                norms.append(_largest(_token_norms(x, tf), tf))
            else:
                norms.append(tf.sqrt(tf.reduce_sum(tf.square(x), axis=_inner_axes(x))))
        for entry in self.embedded:
            shape = tf.shape(inputs[entry.name])
            tokens = tf.cast(tf.reduce_prod(shape[1:]), dtype)
            scale = tf.sqrt(tokens) if self.certificate.norm == "l2" else tf.ones_like(tokens)
            norms.append(tf.fill(shape[:1], scale * tf.constant(self.largest_embedding, dtype)))
        if len(norms) == 1:
            return norms[0]
        if self.certificate.norm == "l2":
            return tf.sqrt(functools.reduce(tf.add, map(tf.square, norms)))
        return functools.reduce(tf.maximum, norms)

    def _distances_to_edge(self, inputs, dtype, tf):
        """Distances of the inputs to the edge of the certified ball, not positive outside of it."""
        limit = self.certificate.threat_model.input_radius
        if math.isinf(limit):
            return []
        distances = []
        for entry in self.perturbed:
            x = tf.cast(inputs[entry.name], dtype)
            largest = _largest(_token_norms(x, tf), tf)
            distance = limit * (1.0 - _ROUNDING_OF_NORMS) - largest * (1.0 + _ROUNDING_OF_NORMS)
            if self.certificate.norm == "linf" and x.shape.rank > 1:
                # A token moves by at most sqrt(size) times its largest entry.
                distance /= math.sqrt(x.shape[-1]) * (1.0 + _ROUNDING_OF_NORMS)
            distances.append(distance)
        return distances

    def _has_certified_length(self, inputs, tf):
        length = self.served.sequence_length
        if length is None:
            return tf.constant(True)
        sizes = [
            tf.shape(inputs[entry.name])[axis]
            for entry in (*self.perturbed, *self.embedded)
            for axis in entry.dynamic_axes
        ]
        if self.certificate.threat_model.shapes:
            # The code of the model was traced at this length; at another length it may do
            # something else.
            return tf.reduce_all([size == length for size in sizes] or [True])
        return tf.reduce_all([size <= length for size in sizes] or [True])


def plan_signature(
    served: ServedModel, certificate: Certificate, outputs: Sequence[np.ndarray]
) -> CertifiedSignature:
    """Decide whether a model gets the signature `certified`.

    Args:
        served: The model and its inputs.
        certificate: Its certificate.
        outputs: Its outputs on an example, flat.
    """
    _, names = call_specs(served.model, (served.structure,))
    covered = certificate.threat_model.inputs
    perturbed = [entry for entry, name in zip(served.inputs, names, strict=True) if name in covered]
    embedded = []
    if any(name.startswith(_LOOKED_UP) for name in covered):
        embedded = [
            entry
            for entry in served.inputs
            if entry not in perturbed and not entry.is_floating and entry.dtype != "bool"
        ]
    tables = [
        cast_to_compute_dtype(layer.embeddings, None)
        for layer in served.model._flatten_layers()
        if getattr(layer, "embeddings", None) is not None
    ]
    largest = max((np.linalg.norm(table, axis=-1).max() for table in tables), default=0.0)
    activation, missing = None, "nothing finite is certified"
    if certificate.is_finite:
        activation, missing = _find_logits(served, certificate)
    unreachable = bool(missing) and certificate.head in ("softmax", "sigmoid")
    if not missing and certificate.head == "logits" and _are_probabilities(outputs[0]):
        unreachable = True
        missing = (
            "its outputs are probabilities that are not made by its last activation: end in a "
            "layer such as `keras.layers.Softmax`, or without a softmax"
        )
    if not missing:
        missing = _length_obstacle(served, certificate)
    if not missing and embedded:
        if not tables:
            missing = "the size of the embeddings of its integer inputs is unknown"
        elif np.isfinite(certificate.threat_model.input_radius):
            missing = "`input_radius` cannot be checked where integers are looked up"
    return CertifiedSignature(
        served=served,
        certificate=certificate,
        missing=missing,
        logits_unreachable=unreachable,
        activation=activation,
        perturbed=perturbed,
        embedded=embedded,
        largest_embedding=float(largest),
    )


def _find_logits(served: ServedModel, certificate: Certificate) -> tuple[Any, str]:
    """The layer or operation whose activation hides the logits, and why there are no logits."""
    if certificate.head in ("", "token logits"):
        return None, "its output is not one vector of numbers per example"
    length = certificate.threat_model.max_tokens
    traced = TracedModel(served.model, (served.structure,), sequence_length=length)
    calls = traced.trace.calls
    if traced.logit_call is None:
        return None, _ending_obstacle(traced.trace, certificate.head)
    last = calls[traced.logit_call]
    if sum(call.operation is last.operation for call in calls) > 1:
        return None, f"its last layer {last.operation.name!r} is called more than once"
    if not last.recorded:
        return None, (
            "its `call` ends in an activation from `keras.ops`, which cannot be left out: "
            "use a layer, such as `keras.layers.Softmax`"
        )
    return last.operation, ""


def _ending_obstacle(trace: Trace, head: str) -> str:
    """Why an output from which no activation can be left out is no logit; empty if it may be."""
    final = [
        call.operation
        for call in trace.calls
        if [*map(id, call.outputs)] == [*map(id, trace.outputs)]
    ]
    activation: Any = getattr(final[-1], "activation", None) if final else None
    if head == "logit" and activation not in _LINEAR:
        name = getattr(activation, "__name__", type(activation).__name__)
        return (
            f"its one unit ends in {name}, for which the value that separates the classes is not "
            "known: end in a sigmoid or without an activation"
        )
    if head == "logits" and activation is keras.activations.sigmoid:
        return "it has several sigmoid units: one label for each unit, not one class"
    return ""


def _length_obstacle(served: ServedModel, certificate: Certificate) -> str:
    """Why a request does not show if it is short enough; empty if it does."""
    longest = certificate.threat_model.max_tokens
    varying = max((len(entry.dynamic_axes) for entry in served.inputs), default=0)
    if longest is None or varying == 0 or (varying == 1 and served.sequence_length is not None):
        return ""
    return (
        f"it is certified for at most {longest} tokens, and the shape of a request does not show "
        "its number of tokens: let one axis vary, and give `sequence_length`"
    )


def _are_probabilities(output: np.ndarray) -> bool:
    output = output.astype(np.float64)
    return bool((output >= 0.0).all() and (np.abs(output.sum(axis=-1) - 1.0) < 1e-3).all())


def _ratio(margin, speed, tf):
    """`margin / speed`, 0 without a margin and at most the largest finite number."""
    dtype = margin.dtype
    if not tf.is_tensor(speed):
        speed = np.maximum(_rounded_up(speed, dtype), _tiny(dtype))
    return tf.minimum(tf.maximum(margin, 0.0) / speed, dtype.max)


def _tiny(dtype):
    """The smallest number of a dtype that no runtime flushes to zero."""
    return np.finfo(dtype.as_numpy_dtype).tiny


def _replace_nan(x, value, tf):
    # Comparison with itself: some runtimes have no `IsNan`.
    return tf.where(tf.not_equal(x, x), tf.constant(value, x.dtype), x)


def _all_finite(x, tf):
    """Whether all entries of each example are finite. Comparisons with NaN are false."""
    return tf.reduce_all(tf.abs(x) <= x.dtype.max, axis=_inner_axes(x))


def _inner_axes(x):
    """All axes but the first; a reshape could not infer sizes of an empty batch."""
    return list(range(1, x.shape.rank))


def _largest(x, tf):
    """Largest entry of each example, 0 if it has none."""
    return tf.maximum(tf.reduce_max(x, axis=_inner_axes(x)), tf.constant(0.0, x.dtype))


def _token_norms(x, tf):
    return tf.norm(x, axis=-1) if x.shape.rank > 1 else tf.abs(x)


def _rounded_up(value, dtype):
    """A number or array converted to a dtype, never smaller than before."""
    target = dtype.as_numpy_dtype
    with np.errstate(over="ignore"):
        rounded = np.asarray(value, np.float64).astype(target)
    short = rounded.astype(np.float64) < value
    return np.where(short, np.nextafter(rounded, target(np.inf)), rounded).astype(target)
