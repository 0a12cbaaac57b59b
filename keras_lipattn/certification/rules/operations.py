"""Elementwise operations and products of `keras.ops` (docs/theory.md, section 8)."""

import math

import keras
import numpy as np

from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.linear_map import matrix_norm
from keras_lipattn.certification.maps import (
    Combination,
    Elementwise,
    LipschitzMap,
    TokenMixing,
    unbounded,
)
from keras_lipattn.certification.reasons import (
    MOVES_BATCH,
    NOT_FINITE,
    UNKNOWN_TOKENS,
    Cause,
)
from keras_lipattn.certification.registry import register_operation
from keras_lipattn.certification.rules.activations import convert, slope
from keras_lipattn.certification.rules.linear import einsum_map, matrix_map, spell_out
from keras_lipattn.certification.rules.merging import product_map
from keras_lipattn.certification.rules.pooling import entries_range
from keras_lipattn.certification.rules.products import einsum_product, matrix_product
from keras_lipattn.certification.tensor_state import product
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY


@register_operation("Negative")
def negative(operation, call):
    return Combination(
        constant=1.0,
        theorem="identity up to sign",
        exact=True,
        operands=(call.state,),
        coefficients=(-1.0,),
    )


@register_operation("Absolute", "Abs", "Fabs", "Sin", "Arctan", "Arcsinh")
def slope_one(operation, call):
    return slope(1.0, call.state)


@register_operation("Cos")
def cosine(operation, call):
    return Elementwise(constant=1.0, theorem="largest slope", exact=True, value_at_zero=1.0)


@register_operation("Erf")
def erf(operation, call):
    # 2 / sqrt(pi), rounded up.
    return slope(1.128380, call.state)


@register_operation("Clip")
def clip(operation, call):
    low, high = (_bound(value) for value in (operation.x_min, operation.x_max))
    token_range = None
    if low is not None and high is not None and call.state.width is not None:
        # With `x_min` above `x_max` every entry is one of the two.
        token_range = TokenRange.of_entries(min(low, high), max(low, high), call.state.width)
    return LipschitzMap(constant=1.0, theorem="largest slope", exact=True, range=token_range)


def _bound(value) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@register_operation("Square")
def square(operation, call):
    return product_map([call.state, call.state], call)


@register_operation("FullLike")
def filled(operation, call):
    # With a constant value the output is fixed and has no row.
    return unbounded("it fills a tensor with values that change with the input")


@register_operation("Matmul")
def matmul(operation, call):
    left, right = call.operand(call.argument("x1")), call.operand(call.argument("x2"))
    if right.values is not None:
        if right.values.ndim == 2 and left.rank >= 2:
            return matrix_map(right.values, None, call.norm)
        return unbounded("it multiplies by an array of matrices, not by one matrix")
    if left.values is not None and left.values.ndim == 2 and right.rank == 3:
        return _mix_tokens(left.values, call)
    return matrix_product([left, right], call)


def _mix_tokens(kernel: np.ndarray, call: LayerCall) -> LipschitzMap:
    """The map of `kernel @ x`, which mixes tokens alike for every channel."""
    if not np.isfinite(kernel).all():
        return unbounded(NOT_FINITE)
    rows = SAFETY * float(np.abs(kernel).sum(axis=1).max(initial=0.0))
    constant = matrix_norm(kernel, "l2") if call.norm == "l2" else rows
    return TokenMixing(
        constant=constant,
        theorem="norm of the mixing matrix",
        exact=True,
        range=call.state.range.about_origin().scaled(rows),
    )


@register_operation("Dot", "Tensordot")
def dot_operation(operation, call):
    left, right = call.operand(call.argument("x1")), call.operand(call.argument("x2"))
    axes = getattr(operation, "axes", 1)
    pairs = [np.ravel(a).tolist() for a in axes] if isinstance(axes, list | tuple) else []
    plain = axes == 1 or pairs in ([[-1], [0]], [[left.rank - 1], [0]])
    if right.values is None or right.values.ndim != 2 or left.rank < 2 or not plain:
        return unbounded(
            "only the product of the last axis with a constant matrix has a rule",
            cause=Cause.NO_RULE,
        )
    return matrix_map(right.values, None, call.norm)


@register_operation("Einsum")
def einsum(operation, call):
    operands = [call.operand(leaf) for leaf in keras.tree.flatten(call.argument("operands"))]
    equation = operation.subscripts.replace(" ", "")
    if len(operands) == 1 and "->" in equation:
        return _rearranged(equation, call)
    if len(operands) != 2 or "->" not in equation:
        return unbounded(f"the equation {equation!r} is not a linear map")
    if operands[0].values is not None:
        inputs, result = equation.split("->")
        first, second = inputs.split(",")
        operands, equation = operands[::-1], f"{second},{first}->{result}"
    kernel = operands[1].values
    if kernel is None:
        return einsum_product(equation, operands, call)
    if not np.isfinite(kernel).all():
        return unbounded(NOT_FINITE)
    return einsum_map(equation, kernel, None, call)


def _rearranged(equation: str, call: LayerCall) -> LipschitzMap:
    """The map of an einsum of one tensor: a sum over some axes, a permutation of the others."""
    state = call.state
    before, _, after = equation.partition("->")
    inputs, result = spell_out(before, after, state.rank)
    if len(set(inputs)) < len(inputs) or len(set(result)) < len(result):
        return unbounded(f"the equation {equation!r} takes a diagonal")
    if inputs[0] != result[:1]:
        return unbounded(MOVES_BATCH)
    sizes = dict(zip(inputs[1:], state.shape, strict=True))
    summed = product(tuple(size for letter, size in sizes.items() if letter not in result))
    if summed is None:
        return unbounded("the number of entries it adds is not known", cause=Cause.SIZE)
    constants = {"l2": SAFETY * math.sqrt(summed), "linf": float(summed)}
    if inputs[-1] == result[-1]:
        constants["token"] = float(summed)
    else:
        constants["token"] = SAFETY * constants["l2"] * convert("l2", "token", state)
    if math.isinf(constants[call.norm]):
        return unbounded(UNKNOWN_TOKENS)
    token_range = entries_range(call, summed)
    if inputs[-1] == result[-1]:
        token_range = state.range.about_origin().scaled(SAFETY * summed)
    return LipschitzMap(constant=constants[call.norm], theorem="sum of entries", range=token_range)
