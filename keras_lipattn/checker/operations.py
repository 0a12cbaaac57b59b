"""Which operations of TensorFlow may occur between the tensors of a step."""

# They copy, move or count entries. Indices that depend on entries are refused elsewhere.
MOVES = frozenset(
    """
    BroadcastTo Cast ConcatV2 ExpandDims Fill GatherV2 Identity IdentityN OnesLike Pack Pad PadV2
    Placeholder Prod Range Rank Reshape Shape Size Slice Split SplitV Squeeze StopGradient
    StridedSlice Tile Transpose Unpack ZerosLike
    """.split()
)
# Of one tensor that changes; a product has one other factor, which is constant.
LINEAR = MOVES | frozenset(
    """
    Add AddV2 AvgPool BatchMatMulV2 BiasAdd Conv2D Einsum MatMul Mean Mul Neg RealDiv Sub Sum
    """.split()
)
# Conditions are computed from masks and shapes only.
_MASKS = frozenset(
    """
    All Any Cumsum Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalNot LogicalOr
    MatrixBandPart NotEqual SelectV2
    """.split()
)
AVERAGES = LINEAR | _MASKS | frozenset({"DivNoNan", "Maximum"})
NORMALIZATION = LINEAR | frozenset({"Rsqrt", "Sqrt", "Square", "SquaredDifference"})
ATTENTION = NORMALIZATION | _MASKS | frozenset({"Abs", "Softmax"})
SORTING = MOVES | frozenset({"Maximum", "Minimum"})
NORMS = MOVES | frozenset({"Maximum", "Sqrt", "Square", "Sum"})
LARGEST = MOVES | frozenset({"Max", "MaxPool"})
# After the logits: a softmax or a sigmoid.
HEAD = MOVES | frozenset({"LogSoftmax", "Sigmoid", "Softmax"})

ACTIVATIONS = {
    "celu": "AddV2 Expm1 Maximum Minimum Mul RealDiv",
    "elu": "Elu",
    "gelu": "Erfc Mul Neg",
    "hard_sigmoid": "AddV2 Mul RealDiv Relu6",
    "hard_silu": "AddV2 Mul RealDiv Relu6",
    "hard_tanh": "Maximum Minimum",
    "leaky_relu": "LeakyRelu",
    "linear": "",
    "log_sigmoid": "Neg Softplus",
    "log_softmax": "LogSoftmax",
    "mish": "Mul Softplus Tanh",
    "relu": "Relu",
    "relu6": "Relu6",
    "selu": "Selu",
    "sigmoid": "Sigmoid",
    "silu": "Mul Sigmoid",
    "softmax": "Softmax",
    "softplus": "Softplus",
    "softsign": "Softsign",
    "squareplus": "AddV2 RealDiv Sqrt Square",
    "tanh": "Tanh",
    "tanh_shrink": "Sub Tanh",
}


def of_activation(name: str) -> frozenset[str]:
    """The operations of an activation, in a graph made by Keras."""
    return MOVES | frozenset(ACTIVATIONS[name].split())


# Operations that a program may have at all: those above, and what loads variables and computes
# radii. None of them touches files other than the variables, or calls code.
KNOWN = (
    ATTENTION
    | AVERAGES
    | HEAD
    | LARGEST
    | NORMS
    | SORTING
    | frozenset(name for names in ACTIVATIONS.values() for name in names.split())
    | frozenset(
        """
        ArgMax AssignVariableOp Const DisableCopyOnRead Greater IsFinite MergeV2Checkpoints Min
        NoOp OneHot PartitionedCall ReadVariableOp ResourceGather RestoreV2 SaveV2 Select
        ShardedFilename StatefulPartitionedCall StaticRegexFullMatch StringJoin VarHandleOp
        VarIsInitializedOp
        """.split()
    )
)
