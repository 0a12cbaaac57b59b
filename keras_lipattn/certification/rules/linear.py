"""Dense and EinsumDense: the norm of the matrix (docs/theory.md, section 8)."""

import math

import keras
import numpy as np

from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.linear_map import matrix_norm
from keras_lipattn.certification.maps import Affine, LipschitzMap, unbounded
from keras_lipattn.certification.reasons import (
    BIAS_ELSEWHERE,
    NOT_FINITE,
    NOT_QUANTIZED,
    UNKNOWN_TOKENS,
)
from keras_lipattn.certification.registry import register_rule
from keras_lipattn.certification.rules.activations import convert, with_activation
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.certification.weights import adds_bias_elsewhere, bias_of, kernel_of
from keras_lipattn.linalg import SAFETY

_THEOREM = {"l2": "spectral norm", "token": "spectral norm", "linf": "largest column sum"}


def matrix_map(
    matrix: np.ndarray, bias: np.ndarray | None, norm: str, *, spectral: float | None = None
) -> LipschitzMap:
    """The map of `x @ matrix + bias` on the last axis; `spectral` is its 2-norm if known."""
    if not np.isfinite(matrix).all() or (bias is not None and not np.isfinite(bias).all()):
        return unbounded(NOT_FINITE)
    return Affine(
        constant=matrix_norm(matrix, norm) if spectral is None or norm == "linf" else spectral,
        theorem=_THEOREM[norm],
        exact=True,
        matrix=matrix,
        bias=bias,
    )


def quantized(layer) -> LipschitzMap | None:
    """The map of a quantized layer, which has no constant; `None` for any other layer."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is None:
        return None
    return unbounded(
        f"it is quantized ({mode}), and rounded activations jump", remedy=NOT_QUANTIZED
    )


@register_rule(keras.layers.Dense)
def dense(layer, call):
    refusal = quantized(layer)
    if refusal is not None:
        return refusal
    kernel = kernel_of(layer)
    layer_map = matrix_map(kernel, bias_of(layer), call.norm)
    return with_activation(layer_map, layer, call, kernel.shape[1])


@register_rule(keras.layers.EinsumDense)
def einsum_dense(layer, call):
    refusal = quantized(layer)
    if refusal is not None:
        return refusal
    kernel = kernel_of(layer)
    bias = bias_of(layer)
    if not np.isfinite(kernel).all() or (bias is not None and not np.isfinite(bias).all()):
        return unbounded(NOT_FINITE)
    if adds_bias_elsewhere(bias, (None, *call.shape)):
        return unbounded(BIAS_ELSEWHERE)
    layer_map = einsum_map(layer.equation, kernel, bias, call)
    return with_activation(layer_map, layer, call, call.shape[-1] if call.shape else None)


def einsum_map(
    equation: str, kernel: np.ndarray, bias: np.ndarray | None, call: LayerCall
) -> LipschitzMap:
    """The map of `einsum(equation, x, kernel) + bias`."""
    equation = equation.replace(" ", "")
    if "->" not in equation or equation.count(",") != 1:
        return unbounded(f"the equation {equation!r} is not a plain linear map")
    operands, result = equation.split("->")
    inputs, weights = operands.split(",")
    rank = call.state.rank
    inputs, result = spell_out(inputs, result, rank)
    letters = set(inputs) | set(weights) | set(result)
    plain = (
        all(len(set(word)) == len(word) for word in (inputs, weights, result))
        and "." not in weights
        and all((letter in result) + (letter in weights) for letter in inputs)
        and all((letter in result) or (letter in inputs) for letter in weights)
        and letters == set(inputs) | set(weights)
        and inputs[0] == result[0]
        and inputs[0] not in weights
    )
    known = dict(zip(inputs[1:], call.state.shape, strict=True)) if plain else {}
    # Some backends broadcast axes of size 1.
    plain = plain and all(known[a] == kernel.shape[weights.index(a)] for a in weights if a in known)
    if not plain:
        return unbounded(f"the equation {equation!r} is not a plain linear map")
    summed = [a for a in weights if a in inputs and a not in result]
    shared = [a for a in weights if a in inputs and a in result]
    made = [a for a in result if a not in inputs]
    order = [weights.index(a) for a in (*shared, *summed, *made)]
    sizes = {a: kernel.shape[weights.index(a)] for a in weights}
    blocks = kernel.transpose(order).reshape(
        math.prod(sizes[a] for a in shared),
        math.prod(sizes[a] for a in summed),
        math.prod(sizes[a] for a in made),
    )
    if (
        summed == [inputs[-1]]
        and made == [result[-1]]
        and not shared
        and inputs[:-1] == result[:-1]
    ):
        return matrix_map(blocks[0], bias, call.norm)
    largest_sum = SAFETY * float(np.abs(blocks).sum(axis=1).max(initial=0.0))
    offset = 0.0 if bias is None else float(np.abs(bias).max(initial=0.0))
    token_range = TokenRange.up_to(largest_sum * call.state.range.largest + offset, call.width)
    if call.norm == "linf":
        return LipschitzMap(
            constant=largest_sum,
            theorem="largest sum over an output",
            exact=True,
            range=token_range,
        )
    matrix = max(matrix_norm(block, "l2") for block in blocks)
    if call.norm == "l2":
        return LipschitzMap(
            constant=matrix,
            theorem="norm of the block-diagonal matrix",
            exact=True,
            range=token_range,
        )
    # Every token of the output takes its entries from one token of the input.
    if summed == [inputs[-1]] and not shared and result == inputs[:-1] + "".join(made):
        last = sizes[result[-1]]
        heads = blocks[0].reshape(blocks.shape[1], -1, last)
        constant = max(matrix_norm(heads[:, i], "l2") for i in range(heads.shape[1]))
        return LipschitzMap(
            constant=constant, theorem="largest norm of a block", exact=True, range=token_range
        )
    price = convert("l2", "token", call.state)
    if math.isinf(price):
        return unbounded(UNKNOWN_TOKENS)
    return LipschitzMap(constant=matrix * price, theorem="2-norm, converted", range=token_range)


def spell_out(inputs: str, result: str, rank: int) -> tuple[str, str]:
    """Replaces "..." by letters that the equation does not use."""
    if "..." not in inputs:
        return inputs, result
    free = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    used = set(inputs + result)
    count = rank - len(inputs.replace("...", ""))
    names = "".join(letter for letter in free if letter not in used)[:count]
    return inputs.replace("...", names), result.replace("...", names)


def scaling_map(scale: np.ndarray, call: LayerCall, *, theorem: str) -> LipschitzMap:
    """The map of `scale * x`, entry by entry."""
    scale = np.asarray(scale, np.float64)
    if not np.isfinite(scale).all():
        return unbounded(NOT_FINITE)
    constant = float(np.abs(scale).max(initial=0.0))
    width = call.state.width
    if width is None or not (scale.size == 1 or (scale.shape[-1] == width == scale.size)):
        return LipschitzMap(constant=constant, theorem=theorem, exact=True)
    diagonal = np.broadcast_to(scale.reshape(-1), (width,))
    return Affine(
        constant=constant,
        theorem=theorem,
        exact=True,
        matrix=None if (diagonal == 1.0).all() else diagonal,
    )
