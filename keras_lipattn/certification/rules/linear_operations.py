"""Linear operations: copies of entries, and maps along axes (docs/theory.md, section 8)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.linear_map import matrix_norm
from keras_lipattn.certification.maps import LipschitzMap, TokenMixing, unbounded
from keras_lipattn.certification.reasons import (
    MOVES_BATCH,
    SIZE_VARIES,
    Cause,
)
from keras_lipattn.certification.registry import register_operation
from keras_lipattn.certification.rules.linear import matrix_map
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

# Largest number of entries of an example: three examples are numbered exactly in float32.
_MOST_ENTRIES = 4_000_000
# Largest size of a matrix along one axis.
_MOST_ROWS = 4096


def axes_map(
    matrices: Mapping[int, np.ndarray],
    call: LayerCall,
    theorem: str,
    *,
    margin: float = 1.0,
    offset: float = 0.0,
) -> LipschitzMap:
    """The map of matrices along some axes, the same for all other indices.

    Args:
        matrices: by axis, the batch axis being 0: shape `(size of output, size of input)`.
        call: the call.
        theorem: where the constant comes from.
        margin: factor for the rounding of the matrices.
        offset: largest absolute entry of a constant that is added.
    """
    last = call.state.rank - 1
    if set(matrices) == {last} and not offset:
        return matrix_map(margin * matrices[last].T, None, call.norm)
    spectral = {axis: matrix_norm(matrix, "l2") for axis, matrix in matrices.items()}
    rows = {axis: matrix_norm(matrix.T, "linf") for axis, matrix in matrices.items()}
    tokens = margin * math.prod(spectral[a] if a == last else rows[a] for a in matrices)
    entries = margin * math.prod(rows.values())
    constants = {"l2": margin * math.prod(spectral.values()), "token": tokens, "linf": entries}
    before = call.state.range
    token_range = None
    if before.bounded:
        width = call.shape[-1] or 1
        token_range = TokenRange(
            tokens * before.outer_radius + SAFETY * math.sqrt(width) * offset,
            None,
            entries * before.largest + offset,
        )
        averages = all((m >= 0.0).all() and (m.sum(axis=1) == 1.0).all() for m in matrices.values())
        if averages and last not in matrices and not offset and margin == 1.0:
            # A ball contains the averages of its points.
            token_range = before
    return (LipschitzMap if last in matrices else TokenMixing)(
        constant=constants[call.norm], theorem=theorem, exact=margin == 1.0, range=token_range
    )


def copies(call: LayerCall, run: Callable, theorem: str = "entries move") -> LipschitzMap:
    """The map of an operation whose outputs are entries of its input, or zeros.

    The operation runs on numbered entries, and the result shows how often it repeats each entry.

    Args:
        call: the call.
        run: the operation as a function of a tensor in place of `call.state`.
        theorem: where the constant comes from.
    """
    state = call.state
    if None in state.shape or any(state.dynamic) or not state.fold:
        return unbounded(SIZE_VARIES)
    size = state.fold * (state.entries or 0)
    if not 0 < size <= _MOST_ENTRIES:
        return unbounded("it has too many entries to follow each of them")
    sources = np.zeros(0, np.int64)
    for examples in (3, 2):
        numbers = np.arange(1.0, examples * size + 1.0).reshape(-1, *state.shape)
        output = keras.ops.convert_to_numpy(run(keras.ops.convert_to_tensor(numbers)))
        if output.ndim == 0 or output.shape[0] != examples * call.fold:
            return unbounded(MOVES_BATCH)
        parts = np.asarray(output, np.int64).reshape(examples, -1)
        sources = parts[0]
        steps = size * np.arange(examples)[:, None]
        if (
            sources.max(initial=0) > size
            or (parts != np.where(sources > 0, sources + steps, 0)).any()
        ):
            return unbounded(MOVES_BATCH)
    return _copied(sources, call, theorem)


def _copied(sources: np.ndarray, call: LayerCall, theorem: str) -> LipschitzMap:
    """The map of an output whose entry `i` is entry `sources[i] - 1` of an example, or 0."""
    old = (call.state.shape[-1] if call.state.shape else 1) or 1
    new = (call.shape[-1] if call.shape else 1) or 1
    tokens = sources.reshape(-1, new)
    kept = tokens > 0
    if not kept.any():
        return LipschitzMap(constant=0.0, theorem=theorem, exact=True, range=TokenRange(0.0))
    often = int(np.bincount(sources)[1:].max(initial=0))
    before = call.state.range
    first = tokens[:, :1]
    alike = (tokens == first + np.arange(new)) & ((first - 1) % old == 0)
    whole = old == new and bool((alike | ~kept.any(axis=1, keepdims=True)).all())
    meeting = 1 if whole else _meeting(tokens, kept, old)
    constants = {"l2": math.sqrt(often), "token": math.sqrt(meeting), "linf": 1.0}
    token_range = before
    if not (whole and kept.all()):
        token_range = TokenRange(
            SAFETY * math.sqrt(meeting) * before.outer_radius, None, before.largest
        )
    return (TokenMixing if whole else LipschitzMap)(
        constant=SAFETY * constants[call.norm],
        theorem=theorem,
        exact=True,
        range=token_range,
    )


def _meeting(tokens: np.ndarray, kept: np.ndarray, width: int) -> int:
    """Largest squared norm of a token of the output, for input tokens of norm 1.

    The maximum is attained by input tokens whose only nonzero entry is the one repeated most often.
    """
    rows = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)[kept]
    pairs, counts = np.unique(
        np.stack([rows, tokens[kept] - 1], axis=1), axis=0, return_counts=True
    )
    olds, place = np.unique(
        np.stack([pairs[:, 0], pairs[:, 1] // width], axis=1), axis=0, return_inverse=True
    )
    most = np.zeros(len(olds), np.int64)
    np.maximum.at(most, place.reshape(-1), counts)
    return int(np.bincount(olds[:, 0], weights=most).max(initial=0.0))


def take_map(operation, given: Any, call: LayerCall) -> LipschitzMap:
    """The map of `keras.ops.take` with constant indices."""
    state = call.state
    if isinstance(given, TensorState):
        return unbounded("its indices are not constants of the model")
    indices = np.asarray(keras.ops.convert_to_numpy(given))
    if operation.axis is None or operation.axis % state.rank == 0:
        return unbounded(MOVES_BATCH)
    axis = operation.axis % state.rank
    last = axis == state.rank - 1
    known = None not in state.shape and not any(state.dynamic)
    if known and (indices.ndim > 1 or (last and indices.ndim == 0)):
        return copies(call, lambda x: operation.call(x, indices), "entries by constant indices")
    if indices.ndim > 1 or (last and indices.ndim == 0) or indices.size == 0:
        return unbounded(SIZE_VARIES)
    length, before = state.shape[axis - 1], state.range
    if length is None or state.dynamic[axis - 1]:
        if indices.min() < 0 <= indices.max():
            return unbounded(SIZE_VARIES)
        # Some backends read zeros beyond the end.
        places, before = np.abs(indices), before.about_origin()
    elif indices.min() < -length or indices.max() >= length:
        return unbounded("its indices are out of range")
    else:
        places = indices % length
    often = int(np.unique(places, return_counts=True)[1].max())
    if last:
        radius = SAFETY * math.sqrt(often) * before.outer_radius
        before = TokenRange(radius, None, before.largest)
    repeats = often > 1 and (call.norm == "l2" or (call.norm == "token" and last))
    return (LipschitzMap if last else TokenMixing)(
        constant=SAFETY * math.sqrt(often) if repeats else 1.0,
        theorem="entries by constant indices",
        exact=True,
        range=before,
    )


@register_operation("TakeAlongAxis")
def take_along_axis(operation, call):
    indices = call.argument("indices")
    if isinstance(indices, TensorState):
        return unbounded("its indices are not constants of the model")
    if operation.axis is None or operation.axis % call.state.rank == 0:
        return unbounded(MOVES_BATCH)
    return copies(call, lambda x: operation.call(x, indices), "entries by constant indices")


@register_operation("Tril", "Triu")
def triangle(operation, call):
    if call.state.rank < 3:
        return unbounded(MOVES_BATCH)
    return copies(call, operation.call, "entries are dropped")


@register_operation("Rot90")
def rotated(operation, call):
    if 0 in {axis % call.state.rank for axis in operation.axes}:
        return unbounded(MOVES_BATCH)
    return copies(call, operation.call)


@register_operation("Diagonal")
def diagonal(operation, call):
    rank = call.state.rank
    if 0 in (operation.axis1 % rank, operation.axis2 % rank):
        return unbounded(MOVES_BATCH)
    return copies(call, operation.call, "entries are dropped")


@register_operation("DepthToSpace", "SpaceToDepth", "Unfold", "PadImages", "CropImages")
def moved(operation, call):
    if call.state.rank != 4:
        return unbounded("its input is a single image without a batch axis", cause=Cause.BATCH)
    return copies(call, operation.call)


@register_operation("Cumsum", "Diff")
def along_axis(operation, call):
    state = call.state
    if operation.axis is None or operation.axis % state.rank == 0:
        return unbounded(MOVES_BATCH)
    axis = operation.axis % state.rank
    length = state.shape[axis - 1]
    if length is None or state.dynamic[axis - 1]:
        return unbounded(SIZE_VARIES)
    if length > _MOST_ROWS:
        return unbounded(f"its axis has more than {_MOST_ROWS} entries")
    if type(operation).__name__ == "Cumsum":
        matrix, theorem = np.tri(length), "norm of the cumulative sum"
    else:
        matrix, theorem = np.diff(np.eye(length), operation.n, axis=0), "norm of the differences"
    return axes_map({axis: matrix}, call, theorem)
