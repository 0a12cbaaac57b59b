"""Which examples a certificate is about."""

import math
from typing import Any

import keras
from keras import ops

from keras_lipattn.certification.certificate import Certificate
from keras_lipattn.certification.keras_models import function_of


def are_covered(certificate: Certificate, model: keras.Model, x: Any) -> Any:
    """Whether the threat model of a certificate covers examples: their sizes and their tokens.

    Args:
        certificate: a global certificate of the model.
        model: the model.
        x: a batch of examples, in the structure of the call.

    Returns:
        A boolean tensor of shape `(examples,)`. With an `input_radius`, examples with integers that
        are looked up are not covered, since the norms of their embeddings are not known.
    """
    threat = certificate.threat_model
    leaves = keras.tree.flatten(x)
    covered = ops.ones((ops.shape(leaves[0])[0],), "bool")
    for index, leaf in enumerate(leaves):
        for axis, largest in enumerate(_sizes(certificate, model, index), 1):
            size = ops.shape(leaf)[axis]
            if largest is not None:
                fits = size == largest if threat.shapes else size <= largest
                covered = ops.logical_and(covered, fits)
    if math.isfinite(threat.input_radius):
        for leaf in leaves:
            dtype = keras.backend.standardize_dtype(leaf.dtype)
            if keras.backend.is_float_dtype(dtype):
                norms = ops.norm(ops.cast(leaf, "float64"), axis=-1)
                inside = ops.reshape(norms, (ops.shape(leaf)[0], -1)) <= threat.input_radius
                covered = ops.logical_and(covered, ops.all(inside, axis=-1))
            elif dtype != "bool":
                covered = ops.zeros_like(covered)
    return covered


def _sizes(certificate: Certificate, model: keras.Model, index: int):
    """For each axis after the first, the largest size or, with exact shapes, the size."""
    threat, function = certificate.threat_model, function_of(model)
    if threat.shapes:
        return threat.shapes[index] if len(threat.shapes) > index else ()
    if function is None or threat.max_tokens is None:
        return ()
    sizes = function.inputs[index].shape[1:]
    return [threat.max_tokens if size is None else None for size in sizes]
