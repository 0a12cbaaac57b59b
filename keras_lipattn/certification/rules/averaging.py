"""Maps of averages of values, weighted by the softmax of scores, between different tensors."""

import math

import numpy as np

from keras_lipattn.bounds.compact import CrossConstants
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap, unbounded
from keras_lipattn.certification.reasons import MOVES_BATCH, UNBOUNDED_TOKENS, Cause
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY


def averages(
    constants: CrossConstants,
    states: list[TensorState],
    call: LayerCall,
    token_range: TokenRange | None,
    theorem: str = "Theorem 7.7, tokens in balls",
) -> LipschitzMap:
    """The map of averages of values, weighted by the softmax of scores of queries and keys."""
    query, key, value = states
    if not keeps_batch(states, call):
        return unbounded(MOVES_BATCH)
    operands, gains = [query, key, value], [constants.query, constants.key, constants.value]
    if key is value:
        operands, gains = [query, value], [constants.query, constants.shared]
    queries = 1.0
    if call.norm == "l2":
        # A key is seen by at most all queries.
        length = call.shape[-2]
        if length is None:
            return unbounded("its number of queries is not known", cause=Cause.SIZE)
        queries = math.sqrt(length)
    for index, state in enumerate(operands):
        gains[index] = SAFETY * gains[index] * (queries if index else 1.0)
        if call.norm == "linf":
            # |x| <= sqrt(D) max|x| on the way in, and max|y| <= |y| on the way out.
            gains[index] *= SAFETY * math.sqrt(state.width) if state.width else math.inf
        if state.is_fixed:
            gains[index] = 0.0
    if not np.isfinite(gains).all():
        return unbounded(UNBOUNDED_TOKENS)
    joint = math.hypot(*gains) if call.norm == "l2" else math.fsum(gains)
    return LipschitzMap(
        constant=SAFETY * joint,
        theorem=theorem,
        operands=tuple(operands),
        per_input=tuple(gains),
        range=token_range,
    )


def keeps_batch(states: list[TensorState], call: LayerCall) -> bool:
    """Whether an example of the output depends on the same example of these tensors alone."""
    perturbed = [state for state in states if not state.is_fixed]
    return all(state.fold == call.fold for state in perturbed) and all(
        state.fold in (0, call.fold) and (state.fold or state.shape[0] == 1) for state in states
    )


def values_range(
    value, output, inner, outer, sizes, before: TokenRange, *, zero_rows: bool
) -> TokenRange:
    """The range of the output: each head maps averages of tokens linearly.

    With `zero_rows` the output of a head may also be zero.
    """
    width = output.shape[-1]
    center = np.zeros(value.shape[1]) if before.center is None else before.center
    moved = TokenRange(0.0) if outer is None else TokenRange(0.0, outer.reshape(-1))
    for head, size in enumerate(sizes):
        image = center @ value[head] + (0.0 if inner is None else inner[head])
        reached = TokenRange(SAFETY * float(size) * before.radius, image @ output[head])
        moved = moved.plus(reached.including(np.zeros(width)) if zero_rows else reached)
    return moved
