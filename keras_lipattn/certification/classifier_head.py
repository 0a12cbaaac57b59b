"""The logits of a classifier: where they are, and a constant for every pair of classes."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds.activated_product import activated_gap_constants
from keras_lipattn.certification.class_code import operation_name
from keras_lipattn.certification.linear_map import as_matrix
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.trace import Trace, TracedCall
from keras_lipattn.layers import NormalizedDense, OrthogonalDense, SpectralDense
from keras_lipattn.linalg import SAFETY
from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# With more classes than this the pairwise constants are not stored.
MOST_PAIRED_CLASSES = 256

# Layers whose rules can leave out the last activation.
_DROPPING = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Activation,
    keras.layers.Softmax,
    SpectralDense,
    NormalizedDense,
    OrthogonalDense,
)
_SOFTMAXES = (keras.activations.softmax, keras.activations.log_softmax)


def find_head(trace: Trace) -> tuple[str, int | None]:
    """Finds out whether a model ends like a classifier.

    Args:
        trace: the trace of the model.

    Returns:
        `"softmax"`, `"sigmoid"` (one unit), `"logits"` (two or more numbers per example), `"logit"`
        (one), `"token logits"` (two or more numbers per token, without a softmax) or `""`, and the
        index of the call whose activation is left out to get logits.
    """
    if len(trace.outputs) != 1:
        return "", None
    (output,) = trace.outputs
    rank = len(output.shape)
    if rank < 2 or output.shape[-1] is None or output.shape[0] != trace.batch:
        return "", None
    classes = output.shape[-1]
    output = trace.resolve(output)
    kind, position = "", None
    for index, call in enumerate(trace.calls):
        if len(call.outputs) == 1 and call.outputs[0] is output:
            kind, position = _activation_kind(call, classes, rank), index
    if rank > 2:
        # Nothing is left out here, so that probabilities are not certified as logits.
        return ("token logits" if classes > 1 and not kind else ""), None
    if kind:
        return kind, position
    return ("logits" if classes > 1 else "logit"), None


def _activation_kind(call: TracedCall, classes: int, rank: int) -> str:
    operation: Any = call.operation
    if isinstance(operation, keras.layers.Layer):
        if type(operation) not in _DROPPING:
            return ""
        if isinstance(operation, keras.layers.Softmax):
            plain = operation.axis in (-1, rank - 1) and call.arguments.get("mask") is None
            return "softmax" if plain and classes > 1 else ""
        activation = operation.activation
        if activation in _SOFTMAXES and classes > 1:
            return "softmax"
        return "sigmoid" if activation is keras.activations.sigmoid and classes == 1 else ""
    if operation_name(operation) in ("Softmax", "LogSoftmax") and classes > 1:
        return "softmax" if operation.axis in (-1, rank - 1) else ""
    return ""


def logits_of(output: np.ndarray, head: str) -> np.ndarray:
    """Logits of a classifier, up to a number that all classes of an example share.

    Args:
        output: output of the model, `(..., classes)`: logits or probabilities.
        head: kind of the classifier, see `find_head`.

    Returns:
        An array of float64. Logits of probabilities that were rounded to 0 or 1 are nearer to those
        of other classes than they were, so that no margin grows.
    """
    dtype = np.asarray(output).dtype.name
    roundoff = UNIT_ROUNDOFF.get(dtype, UNIT_ROUNDOFF["float32"])
    # Smaller numbers have fewer digits, or were flushed to zero.
    tiny = float(np.finfo(np.float16 if dtype == "float16" else np.float32).tiny)
    output = np.asarray(output).astype(np.float64)
    if head == "softmax":
        # The entries of a log-softmax are not positive, and not all are 0.
        is_log = (output < 0.0).any(axis=-1, keepdims=True)
        return np.where(is_log, output, np.log(np.maximum(output, tiny)))
    if head == "sigmoid":
        above = np.log(np.maximum(output, tiny) / (1.0 - output + 2.0 * roundoff))
        below = np.log(np.maximum(output, tiny) / np.maximum(1.0 - output, tiny))
        return np.where(output > 0.5, np.maximum(above, 0.0), below)
    return output


def pairwise_constants(
    state: TensorState, total: float, norm: str
) -> tuple[tuple[float, ...], ...]:
    """Lipschitz constants of `z_y - z_j` for all pairs of classes.

    For features of constant `L` and the kernel `w` of the last linear map it is `L |w_y - w_j|`
    (docs/theory.md, section 8). Where an activation and a linear map come before, the three
    together have a constant for each pair as well. Without these it is `sqrt(2)` times the
    constant of the logits, or twice that constant in the max norm. The smaller one is used.

    Args:
        state: state of the logits.
        total: constant of the logits.
        norm: norm of the certificate.

    Returns:
        A symmetric matrix with a zero diagonal; no rows for more than 256 classes.
    """
    classes = state.shape[-1]
    if classes is None or not 2 <= classes <= MOST_PAIRED_CLASSES:
        return ()
    general = total * (2.0 if norm == "linf" else SAFETY * math.sqrt(2.0))
    pairs = np.full((classes, classes), general)
    for features, kernel in state.routes:
        matrix = as_matrix(kernel, classes)
        constant = SAFETY * _value(features.gain.log)
        for label in range(classes):
            # Differences instead of a Gram expansion, which cancels for close columns.
            gaps = matrix[:, label : label + 1] - matrix
            sizes = np.abs(gaps).sum(axis=0) if norm == "linf" else np.linalg.norm(gaps, axis=0)
            with np.errstate(invalid="ignore"):
                route = constant * SAFETY * sizes
            pairs[label] = np.fmin(pairs[label], np.where(np.isnan(route), np.inf, route))
    activated = state.activated
    if activated is not None and activated.after is not None and activated.after.ndim == 2:
        gaps = activated_gap_constants(activated.before, activated.after, activated.slopes, norm)
        with np.errstate(invalid="ignore"):
            route = SAFETY * _value(activated.root.gain.log) * gaps
        pairs = np.fmin(pairs, np.where(np.isnan(route), np.inf, route))
    np.fill_diagonal(pairs, 0.0)
    pairs = np.minimum(pairs, pairs.T)
    return tuple(tuple(float(value) for value in row) for row in pairs)


def _value(log: float) -> float:
    return math.exp(log) if log < 709.0 else math.inf


@contextlib.contextmanager
def without_activation(operation: Any) -> Iterator[None]:
    """Makes a layer or operation return the input of its activation, as a context manager.

    It changes the layer itself and is not safe for threads.

    Args:
        operation: the layer or operation that ends in an activation; `None` changes nothing.
    """
    if operation is None:
        yield
        return
    # Past `__setattr__`, which would track the function as part of the layer.
    attributes = vars(operation)
    if "activation" in attributes:
        kept = attributes["activation"]
        attributes["activation"] = keras.activations.linear
        try:
            yield
        finally:
            attributes["activation"] = kept
    else:
        attributes["call"] = _first_argument
        try:
            yield
        finally:
            del attributes["call"]


def _first_argument(*args, **kwargs):
    return args[0] if args else next(iter(kwargs.values()))
