"""What evaluating a network in floating point can do to its logits.

A certificate speaks of the function in real arithmetic; the server computes in floating point. The
certified signature therefore takes an allowance off every margin before it becomes a radius.

Derivation. Let the network be `f = f_m o ... o f_1`. In floating point operation `k` returns
`f_k(a) + d_k`, and a sum of `n` rounded terms errs by about `u sqrt(n)` times the sum of their
absolute values, `u` being the unit roundoff (Higham and Mary, "A new approach to probabilistic
rounding error analysis", SIAM J. Sci. Comput. 2019: rounding errors of mean zero grow with
`sqrt(n)`, where the worst case is `n`). So `|d_k| <= u sqrt(n_k) (L_k |a_k| + b_k)` with `L_k` the
constant and `b_k` the offset of operation `k`. What follows amplifies `d_k` by at most the product
of the later constants, and `|a_k|` is at most the product of the earlier ones times `|x|`, plus
what the offsets contribute. Summed over `k`, to first order in `u`:

```
|computed z - z| <= kappa (L |x| + b),        kappa = u sum_k sqrt(n_k)
```

with `L` the constant of the network and `b` the size of what the offsets contribute, for which
`max(1, max|z|)` stands. A difference of two logits errs by twice that:

```
allowance(x) = 2 kappa (L |x| + max(1, max_j |z_j|))
```

The errors of all operations are added as if they had one sign, which they have not: measured errors
lie far below. It is a stated allowance all the same, not a theorem: it trusts that rounding errors
of one sum do not conspire and that a layer's constant measures its amplification.
"""

import math
from typing import Any

from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# They move numbers around, or handle none of the function's values, and round nothing.
_EXACT = frozenset(
    {
        "BroadcastTo",
        "ConcatV2",
        "Const",
        "ExpandDims",
        "Fill",
        "GatherNd",
        "GatherV2",
        "Identity",
        "IdentityN",
        "MatrixDiagPartV3",
        "Max",
        "MaxPool",
        "Maximum",
        "Min",
        "Minimum",
        "Neg",
        "OnesLike",
        "Pack",
        "Pad",
        "PadV2",
        "Placeholder",
        "ReadVariableOp",
        "Relu",
        "Reshape",
        "ResourceGather",
        "SelectV2",
        "Slice",
        "Split",
        "SplitV",
        "Squeeze",
        "StopGradient",
        "StridedSlice",
        "Tile",
        "Transpose",
        "Unpack",
        "ZerosLike",
    }
)
# Transcendental functions and quotients are within a few units of the last place.
_ELEMENTWISE_TERMS = 4


def relative_error(graph: Any, sequence_length: int | None) -> float:
    """`kappa` of a traced function.

    Args:
        graph: `tf.Graph` of the function, inner functions inlined or empty.
        sequence_length: Size of axes which vary, apart from the batch.

    Returns:
        The sum over all operations on real numbers of `u sqrt(n)`.
    """
    return math.fsum(_of_operation(operation, sequence_length) for operation in _operations(graph))


def _operations(graph: Any) -> list[Any]:
    """All operations of a function and of the functions it calls, once for every call."""
    operations = []
    for operation in graph.get_operations():
        operations.append(operation)
        for attribute in operation.node_def.attr.values():
            for name in (attribute.func.name, *(function.name for function in attribute.list.func)):
                if name:
                    inner = graph._get_function(name)
                    operations += _operations(inner.graph if hasattr(inner, "graph") else inner)
    return operations


def _of_operation(operation: Any, sequence_length: int | None) -> float:
    outputs = [o.dtype.name for o in operation.outputs if o.dtype.name in UNIT_ROUNDOFF]
    if operation.type in _EXACT or not outputs:
        return 0.0
    unit = max(UNIT_ROUNDOFF[name] for name in outputs)
    return unit * math.sqrt(_terms(operation, sequence_length or 1))


def _terms(operation: Any, length: int) -> int:
    """Number of terms of the longest sum in an operation."""

    def sizes(tensor):
        shape = tensor.shape.as_list() if tensor.shape.rank is not None else []
        return [length if size is None else size for size in shape]

    first = sizes(operation.inputs[0]) if operation.inputs else []
    kind = operation.type
    if kind == "MatMul":
        return first[0 if operation.get_attr("transpose_a") else 1]
    if kind.startswith("BatchMatMul"):
        return first[-2 if operation.get_attr("adj_x") else -1]
    if kind == "Einsum":
        terms, result = operation.get_attr("equation").decode().split("->")
        dimensions = {}
        for word, tensor in zip(terms.split(","), operation.inputs, strict=True):
            # Axes under an ellipsis are never summed over.
            letters = word.replace("...", "")
            dimensions.update(zip(letters, sizes(tensor)[-len(letters) :], strict=False))
        return math.prod(size for letter, size in dimensions.items() if letter not in result)
    if kind.startswith(("Conv", "DepthwiseConv")):
        return math.prod(sizes(operation.inputs[1])[:-1])
    if kind in ("Sum", "Mean", "Prod", "EuclideanNorm"):
        # Unknown axes, the batch among them, count alike on both sides.
        return math.prod(first) // max(1, math.prod(sizes(operation.outputs[0])))
    if kind in ("AvgPool", "AvgPool3D"):
        return math.prod(operation.get_attr("ksize"))
    if kind == "Cumsum":
        return max(first[1:], default=1)
    if kind in ("Softmax", "LogSoftmax"):
        return first[-1] + _ELEMENTWISE_TERMS
    return _ELEMENTWISE_TERMS
