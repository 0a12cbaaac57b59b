"""The inputs and outputs of a served model, and its functions as TensorFlow graphs."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.certification.keras_models import call_specs, function_of
from keras_lipattn.layers import lipschitz_layers
from keras_lipattn.linalg.precision import UNIT_ROUNDOFF

# Keras numbers its default names by a counter of the process; the name of an input must not
# depend on that.
_DEFAULT_NAME = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


# Operations without rounding: they move, select or compare numbers.
_EXACT = frozenset(
    """
    BroadcastTo ConcatV2 Const ExpandDims Fill GatherNd GatherV2 Identity IdentityN
    MatrixDiagPartV3 Max MaxPool Maximum Min Minimum Neg OnesLike Pack Pad PadV2 Placeholder
    ReadVariableOp Relu Reshape ResourceGather SelectV2 Slice Split SplitV Squeeze StopGradient
    StridedSlice Tile Transpose Unpack ZerosLike
    """.split()
)
# Transcendental functions and quotients are within a few units of the last place.
_ELEMENTWISE_TERMS = 4


class ExportError(RuntimeError):
    """The export was refused or failed. Nothing was published.

    Example:

    >>> inputs = keras.Input((6, 8))
    >>> model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs))
    >>> try:
    ...     exported = keras_lipattn.export_saved_model(model, "build/unbounded", verbose=False)
    ... except keras_lipattn.ExportError:
    ...     print("refused: the model has no constant")
    refused: the model has no constant
    """


@dataclasses.dataclass(frozen=True)
class ServedInput:
    """One named input of a signature.

    Args:
        name: A Python identifier.
        shape: Sizes of all axes; `None` for the batch axis and others that vary.
        dtype: Name of the dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def dynamic_axes(self) -> tuple[int, ...]:
        """Axes other than the batch axis whose size varies between requests."""
        return tuple(axis for axis, size in enumerate(self.shape) if axis and size is None)

    @property
    def is_floating(self) -> bool:
        """Whether the entries are real numbers."""
        return "float" in self.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model and how it is called when it is served.

    Args:
        model: The Keras model.
        structure: Its inputs as a nested structure of `KerasTensor`.
        inputs: The same inputs, flat, in the order of `keras.tree.flatten`.
        sequence_length: Largest size of an axis that varies, or `None`.
    """

    model: keras.Model
    structure: Any
    inputs: Sequence[ServedInput]
    sequence_length: int | None

    def call(self, tensors: Mapping[str, Any]) -> Any:
        """Call the model at inference on named tensors."""
        flat = [tensors[entry.name] for entry in self.inputs]
        return self.model(keras.tree.pack_sequence_as(self.structure, flat), training=False)

    def named_outputs(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of the model, by the names that Keras's own export gives them."""
        outputs = self.call(tensors)
        named = _named_leaves(outputs, single="output_0", several="output", use_own_names=False)
        return dict(named)

    def predict(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of the model on named arrays, computed on the CPU like the served ones."""
        tensors = {
            entry.name: keras.ops.convert_to_tensor(arrays[entry.name], dtype=entry.dtype)
            for entry in self.inputs
        }
        with keras.device("cpu:0"):
            outputs = self.named_outputs(tensors)
        return {
            name: np.asarray(keras.ops.convert_to_numpy(output)) for name, output in outputs.items()
        }

    def trace(self, function: Callable[..., dict[str, Any]]) -> Any:
        """Trace a function that takes the inputs as keyword arguments.

        Args:
            function: Returns tensors by name.

        Returns:
            A concrete function.
        """
        import tensorflow as tf

        specs = {
            entry.name: tf.TensorSpec(entry.shape, entry.dtype, name=entry.name)
            for entry in self.inputs
        }
        # AutoGraph is for plain Python code; Keras layers need none.
        return tf.function(function, autograph=False).get_concrete_function(**specs)

    def trace_outputs(self) -> Any:
        """Trace the function behind `serving_default`."""

        def serving_default(**tensors):
            return self.named_outputs(tensors)

        return self.trace(serving_default)


def served_model(
    model: keras.Model, example_batch: Any, sequence_length: int | None
) -> ServedModel:
    """Determine how a model is called when it is served.

    Args:
        model: A built model.
        example_batch: Inputs whose shapes are taken if the model has no graph, or `None`.
        sequence_length: Largest size of an axis that varies. If `None`, the smallest
            `max_sequence_length` of the layers.

    Raises:
        ValueError: If the inputs cannot be determined.
    """
    structure = _input_structure(model, example_batch, sequence_length)
    inputs = []
    for name, leaf in _named_leaves(structure, single="inputs", several="inputs"):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or len(shape) == 0:
            raise ValueError(
                "Every input of the model must have a shape, with the batch axis first, and a "
                f"dtype. Received: {leaf}"
            )
        dtype = keras.backend.standardize_dtype(dtype)
        inputs.append(ServedInput(name, (None, *tuple(shape)[1:]), dtype))
    if sequence_length is None and any(entry.dynamic_axes for entry in inputs):
        lengths = [getattr(layer, "max_sequence_length", None) for layer in lipschitz_layers(model)]
        sequence_length = min((size for size in lengths if size is not None), default=None)
    return ServedModel(
        model=model, structure=structure, inputs=inputs, sequence_length=sequence_length
    )


def _input_structure(model: keras.Model, example_batch: Any, sequence_length: int | None) -> Any:
    function = function_of(model)
    if function is not None:
        return function.input
    if example_batch is None:
        try:
            arguments = call_specs(model)[0]
        except ValueError as error:
            raise ValueError(
                "A model that is neither Functional nor Sequential needs an `example_batch`, which "
                f"gives the shapes of its inputs. Received: example_batch={example_batch}"
            ) from error
        if len(arguments) != 1:
            raise ValueError(
                "The model must take its inputs as one argument: a tensor, list or dict. "
                f"Received: {len(arguments)} arguments"
            )
        example_batch = arguments[0]
    return keras.tree.map_structure(lambda leaf: _symbol(leaf, sequence_length), example_batch)


def _symbol(leaf: Any, sequence_length: int | None) -> keras.KerasTensor:
    if not isinstance(leaf, keras.KerasTensor):
        leaf = keras.ops.convert_to_tensor(leaf)
    sizes = list(leaf.shape)
    if sequence_length is not None and len(sizes) > 2:
        sizes[1] = None
    return keras.KerasTensor((None, *sizes[1:]), dtype=leaf.dtype)


def _named_leaves(
    structure: Any, *, single: str, several: str, use_own_names: bool = True
) -> list[tuple[str, Any]]:
    """The leaves of a structure, each with a different Python identifier."""
    leaves = keras.tree.flatten_with_path(structure)
    named: dict[str, Any] = {}
    for index, (path, leaf) in enumerate(leaves):
        name = single if len(leaves) == 1 else f"{several}_{index}"
        own_name = getattr(leaf, "name", None) if use_own_names else None
        if path and isinstance(path[-1], str):
            name = "_".join(str(part) for part in path)
        elif own_name and not _DEFAULT_NAME.fullmatch(own_name):
            name = own_name
        name = re.sub(r"\W", "_", name)
        name = f"_{name}" if not name or name[0].isdigit() else name
        unique, count = name, 1
        while unique in named:
            count += 1
            unique = f"{name}_{count}"
        named[unique] = leaf
    return list(named.items())


def trackable(model: keras.Model, functions: Iterable[Any]) -> Any:
    """The object to save: the variables and tables that functions read, and no others.

    Args:
        model: The condensed model.
        functions: Concrete functions.

    Raises:
        ExportError: If a function reads a weight that its layer replaces by a constant.
    """
    import tensorflow as tf

    names = {id(variable.value): variable.path for variable in model.variables}
    replaced = {}
    for layer in lipschitz_layers(model):
        replaced.update({id(kernel.value): layer for kernel in layer.kernels})
        names.update({id(v.value): f"{layer.path}/{v.name}" for v in layer.condensed_variables})
    constants: dict[str, Any] = {}
    for variable in (variable for function in functions for variable in function.graph.variables):
        if id(variable) in replaced:
            raise ExportError(
                "A layer must run with its condensed constants, but a `tf.function` around it was "
                "traced before the export. Received: layer "
                f"{replaced[id(variable)].path!r} reading {variable.name!r}"
            )
        name = names.get(id(variable), variable.name)
        while name in constants and constants[name] is not variable:
            name += "_"
        constants[name] = variable
    saved: Any = tf.Module()
    saved.constants = constants
    # Graphs do not list the tables of layers that look up strings or integers.
    saved.tables = [
        value
        for layer in model._flatten_layers()
        for value in vars(layer).values()
        if isinstance(value, tf.saved_model.experimental.TrackableResource)
    ]
    return saved


def relative_rounding_error(graph: Any, sequence_length: int | None) -> float:
    """The factor `kappa` of the rounding error of a traced function.

    A certificate bounds the function in real arithmetic, but the server computes in floating point.
    The certified signature therefore subtracts an allowance from every margin before it becomes a
    radius.

    Derivation. Let the network be `f = f_m o ... o f_1`. In floating point, operation `k` returns
    `f_k(a) + d_k`, and a sum of `n` rounded terms errs by about `u sqrt(n)` times the sum of their
    absolute values, where `u` is the unit roundoff (rounding errors of mean zero grow with
    `sqrt(n)`; the worst case is `n`). So `|d_k| <= u sqrt(n_k) (L_k |a_k| + b_k)`, where `L_k` is
    the constant and `b_k` the offset of operation `k`. The later operations amplify `d_k` by at
    most the product of their constants, and `|a_k|` is at most the product of the earlier constants
    times `|x|`, plus the contribution of the offsets. Summed over `k`, to first order in `u`:

    ```
    |computed z - z| <= kappa (L |x| + b),        kappa = u sum_k sqrt(n_k)
    ```

    where `L` is the constant of the network and `b` the size of the contribution of the offsets,
    which is replaced by `max(1, max|z|)`. A difference of two logits errs by twice that:

    ```
    allowance(x) = 2 kappa (L |x| + max(1, max_j |z_j|))
    ```

    The errors of all operations are added as if they had the same sign, so measured errors are much
    smaller. It is a stated allowance, not a theorem: it assumes that the rounding errors of a sum
    are independent and that the constant of a layer measures its amplification.

    Args:
        graph: `tf.Graph` of the function.
        sequence_length: Size used for axes that vary, apart from the batch axis.

    Returns:
        The sum of `u sqrt(n)` over all operations on real numbers.

    Reference:

    - [Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci.
      Comput. 2019](https://doi.org/10.1137/18M1226312)
    """
    return math.fsum(
        _error_of_operation(operation, sequence_length or 1) for operation in _operations(graph)
    )


def _operations(graph: Any) -> list[Any]:
    """All operations of a graph and of the functions it calls, once for every call."""
    operations = []
    for operation in graph.get_operations():
        operations.append(operation)
        for attribute in operation.node_def.attr.values():
            for name in (attribute.func.name, *(function.name for function in attribute.list.func)):
                if name:
                    inner = graph._get_function(name)
                    operations += _operations(inner.graph if hasattr(inner, "graph") else inner)
    return operations


def _error_of_operation(operation: Any, length: int) -> float:
    units = [UNIT_ROUNDOFF.get(output.dtype.name, 0.0) for output in operation.outputs]
    if operation.type in _EXACT or not any(units):
        return 0.0
    return max(units) * math.sqrt(_terms(operation, length))


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
        # Unknown axes, such as the batch axis, count the same on both sides.
        return math.prod(first) // max(1, math.prod(sizes(operation.outputs[0])))
    if kind in ("AvgPool", "AvgPool3D"):
        return math.prod(operation.get_attr("ksize"))
    if kind == "Cumsum":
        return max(first[1:], default=1)
    if kind in ("Softmax", "LogSoftmax"):
        return first[-1] + _ELEMENTWISE_TERMS
    return _ELEMENTWISE_TERMS
