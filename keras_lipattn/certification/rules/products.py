"""Products of two tensors of the model, for bounded tensors (docs/theory.md, section 8).

For fixed indices of the axes that both tensors and the result share, the result is a matrix product
`Z = X Y`, and `|Z - Z'| <= |X| |Y - Y'| + |Y'| |X - X'|` in Frobenius norms.
"""

import math

import keras

from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.reasons import (
    Cause,
    Reason,
)
from keras_lipattn.certification.registry import register_rule
from keras_lipattn.certification.rules.merging import operands_of
from keras_lipattn.certification.tensor_state import TensorState, product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

_NOT_BOUNDED = Reason(
    "it multiplies two tensors of the model that are not bounded", cause=Cause.UNBOUNDED
)
_BATCH = Reason(
    "it multiplies tensors across the batch axis, or repeats one along it", cause=Cause.BATCH
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def contraction(
    first: str, second: str, result: str, operands: list[TensorState], call: LayerCall
) -> LipschitzMap:
    """The map of `einsum("first,second->result", *operands)`.

    Args:
        first: letters of the axes of the first operand, the batch axis included.
        second: letters of the second operand.
        result: letters of the output; a letter of no operand is an axis of size 1.
        operands: two tensors, at least one of which changes.
        call: the call.

    Returns:
        A `LipschitzMap`.
    """
    terms = (first, second)
    if any(state.fold != call.fold or not state.fold for state in operands) or not (
        first[:1] == second[:1] == result[:1] != ""
    ):
        return unbounded(_BATCH)
    sizes: dict[str, int | None] = {}
    for term, state in zip(terms, operands, strict=True):
        for letter, size, varies in zip(term[1:], state.shape, state.dynamic, strict=True):
            known = sizes.setdefault(letter, size)
            if known is None or size is None:
                sizes[letter] = None
            elif known != size and not varies:
                return unbounded("it repeats a tensor along an axis")
            else:
                sizes[letter] = max(known, size)
    plain = all(len(set(term)) == len(term) for term in (*terms, result)) and all(
        (letter in first) + (letter in second) + (letter in result) > 1 or size == 1
        for letter, size in sizes.items()
    )
    if not plain:
        return unbounded("it sums a tensor along an axis before the product")
    # Axes with fixed indices, see the docstring of the module.
    fixed = {
        "l2": set(first) & set(second) & set(result),
        "token": set(result[:-1]),
        "linf": set(result),
    }
    bounds = [_size(term, state, fixed, sizes) for term, state in zip(terms, operands, strict=True)]
    gains = []
    for index, (term, state) in enumerate(zip(terms, operands, strict=True)):
        other = bounds[1 - index][call.norm]
        moved = 1.0
        if call.norm != "l2":
            # From the norm of the certificate to the Euclidean norm over the other axes.
            moved = _root(term if call.norm == "linf" else term[:-1], fixed[call.norm], sizes)
        gains.append(0.0 if state.is_fixed else SAFETY * other * moved)
    if not all(math.isfinite(gain) for gain in gains):
        return unbounded(_NOT_BOUNDED)
    joint = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
    return LipschitzMap(
        constant=SAFETY * joint,
        theorem="product rule on bounded factors",
        operands=tuple(operands),
        per_input=tuple(gains),
        range=_range(bounds),
    )


def _size(term: str, state: TensorState, fixed, sizes) -> dict[str, float]:
    """Bounds of the Euclidean norm over the axes that are not fixed, for every norm."""
    largest = 1.0 if state.dtype == "bool" else state.range.largest
    bounds = {}
    for norm, letters in fixed.items():
        size = largest * _root(term, letters, sizes)
        if term[-1] not in letters and len(term) > 1:
            size = min(size, state.range.outer_radius * _root(term[:-1], letters, sizes))
        bounds[norm] = SAFETY * size if size < math.inf else math.inf
    return bounds


def _root(term: str, fixed: set[str], sizes: dict[str, int | None]) -> float:
    """Square root of the number of indices of the axes after the first one that are not fixed."""
    count = product(tuple(sizes[letter] for letter in term[1:] if letter not in fixed))
    return math.inf if count is None else math.sqrt(count)


def _range(bounds) -> TokenRange | None:
    token = bounds[0]["token"] * bounds[1]["token"]
    entry = bounds[0]["linf"] * bounds[1]["linf"]
    if not math.isfinite(token):
        return None
    return TokenRange(SAFETY * token, None, SAFETY * entry)


def matrix_product(operands: list[TensorState], call: LayerCall) -> LipschitzMap:
    """The map of `matmul`: axes before the last two are shared, or of size 1."""
    left, right = operands
    if not (left.rank == right.rank == call.rank >= 3 and left.fold == right.fold):
        return unbounded(_BATCH)
    free = iter(_LETTERS)
    batch = next(free)
    terms = [batch, batch, batch]
    for one, other in zip(left.shape[:-2], right.shape[:-2], strict=True):
        shared = next(free)
        terms[0] += shared if one != 1 or other == 1 else next(free)
        terms[1] += shared if other != 1 or one == 1 else next(free)
        terms[2] += shared
    rows, inner, columns = next(free), next(free), next(free)
    first, second, result = terms
    return contraction(
        first + rows + inner, second + inner + columns, result + rows + columns, operands, call
    )


def einsum_product(equation: str, operands: list[TensorState], call: LayerCall) -> LipschitzMap:
    """The map of an einsum of two tensors of the model."""
    inputs, result = equation.split("->")
    terms = inputs.split(",")
    if "..." in equation:
        counts = {
            state.rank - len(term.replace("...", ""))
            for term, state in zip(terms, operands, strict=True)
        }
        if len(counts) != 1 or not all("..." in term for term in (*terms, result)):
            return unbounded(f"the equation {equation!r} repeats a tensor along an axis")
        names = "".join(a for a in _LETTERS if a not in equation)[: counts.pop()]
        terms = [term.replace("...", names) for term in terms]
        result = result.replace("...", names)
    if any(len(term) != state.rank for term, state in zip(terms, operands, strict=True)):
        return unbounded(f"the equation {equation!r} does not fit its tensors")
    return contraction(terms[0], terms[1], result, operands, call)


@register_rule(keras.layers.Dot)
def dot(layer, call):
    operands = operands_of(call, "inputs")
    if layer.normalize:
        return unbounded("it divides by the norms of its inputs, and they may come close to 0")
    axes = layer.axes if isinstance(layer.axes, list | tuple) else (layer.axes, layer.axes)
    axes = [axis % state.rank for axis, state in zip(axes, operands, strict=True)]
    letters = iter(_LETTERS[2:])
    terms, result = [], "a"
    for axis, state in zip(axes, operands, strict=True):
        names = ["a", *(next(letters) for _ in state.shape)]
        names[axis] = "b"
        terms.append("".join(names))
        result += "".join(name for name in names[1:] if name != "b")
    if result == "a":
        # Scalars get an axis of size 1.
        result += next(letters)
    return contraction(terms[0], terms[1], result, operands, call)
