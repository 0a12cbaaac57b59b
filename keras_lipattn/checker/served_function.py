"""One signature of a SavedModel as a flat graph of TensorFlow operations."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_lipattn.checker.refusal import NotVerified, require

# Operations whose output has the entries of their first input.
_COPIES = frozenset({"Identity", "StopGradient", "IdentityN", "PreventGradient"})
# What inlining puts in front of the names in a signature.
_PREFIXES = ("StatefulPartitionedCall/", "PartitionedCall/", "")
_INTEGERS = frozenset({"Shape", "ShapeN", "Size", "Rank"})
# They belong to any kind of step, but on integers alone.
_OF_INTEGERS = frozenset({"Prod", "Range"})


class ServedFunction:
    """A signature with its variables as constants and all functions inlined.

    Tensors go by names such as `"dense/BiasAdd:0"`.

    Args:
        concrete: The signature of a loaded SavedModel.
        name: Name of the signature.
        arguments: Maps the placeholders of the inputs to their names, if these differ.

    Attributes:
        inputs: Maps the name of an input to its tensor.
        outputs: Maps the name of an output to its tensor.
    """

    def __init__(self, concrete: Any, name: str, arguments: Mapping[str, str] | None = None):
        from tensorflow.python.framework import convert_to_constants

        self.name = name
        frozen = convert_to_constants.convert_variables_to_constants_v2(
            concrete, lower_control_flow=False
        )
        self._definition = frozen.graph.as_graph_def()
        self._nodes = {node.name: node for node in self._definition.node}
        for node in self._definition.node:
            # Copies have no part in the values, nor has the order of operations.
            operands = [self.original(_tensor(one)) for one in node.input if one[0] != "^"]
            del node.input[:]
            node.input.extend(operands)
        named = {
            (arguments or {}).get(tensor.name, tensor.name.partition(":")[0]): tensor
            for tensor in frozen.inputs
        }
        self.inputs = {key: tensor.name for key, tensor in named.items()}
        self.specs = {
            key: (tensor.shape.as_list(), tensor.dtype.name) for key, tensor in named.items()
        }
        self._arguments = {one.partition(":")[0]: key for key, one in self.inputs.items()}
        self.outputs = {
            key: self.original(tensor.name)
            for key, tensor in zip(sorted(concrete.structured_outputs), frozen.outputs, strict=True)
        }
        libraries = len(self._definition.library.function)
        require(not libraries, f"the graph of {name} calls functions or has control flow")
        self._pruned: dict[Any, Any] = {}

    # Structure --------------------------------------------------------------------------------

    def tensor(self, name: str) -> str:
        """The tensor that a proof names."""
        node, _, index = name.partition(":")
        for prefix in _PREFIXES:
            if prefix + node in self._nodes:
                return self.original(f"{prefix}{node}:{index or 0}")
        raise NotVerified(f"the graph of {self.name} has no tensor {name!r}")

    def has(self, name: str) -> bool:
        """Whether the graph has a tensor that a proof names."""
        node = name.partition(":")[0]
        return any(prefix + node in self._nodes for prefix in _PREFIXES)

    def original(self, tensor: str) -> str:
        """The tensor of which this one is a copy, or the tensor itself."""
        while True:
            node = self.node(tensor)
            if node.op not in _COPIES:
                return tensor
            index = int(tensor.partition(":")[2]) if node.op == "IdentityN" else 0
            require(index < len(node.input), "a copy has too few inputs")
            tensor = _tensor(node.input[index])

    def node(self, tensor: str) -> Any:
        """The operation that computes a tensor."""
        return self._nodes[tensor.partition(":")[0]]

    def operands(self, node: Any) -> list[str]:
        """The tensors that an operation takes."""
        return list(node.input)

    def reached(self, tensor: str) -> frozenset[str]:
        """Names of the inputs that a tensor depends on."""
        return self._reached[tensor.partition(":")[0]]

    @functools.cached_property
    def _reached(self) -> dict[str, frozenset[str]]:
        known: dict[str, frozenset[str]] = {}
        for start in self._nodes:
            stack = [start]
            while stack:
                name = stack[-1]
                if name in known:
                    stack.pop()
                    continue
                node = self._nodes[name]
                before = [one.partition(":")[0] for one in self.operands(node)]
                missing = [one for one in before if one not in known]
                if missing:
                    require(len(stack) <= len(self._nodes), "the graph has a cycle")
                    stack += missing
                    continue
                own = frozenset({name}) if node.op == "Placeholder" else frozenset()
                known[name] = own.union(*(known[one] for one in before))
                stack.pop()
        return known

    def depends_on_floats(self, tensor: str) -> bool:
        """Whether a tensor depends on a floating-point input."""
        return any("float" in self.specs[name][1] for name in self.reached(tensor))

    def ancestors(self, tensor: str) -> list[str]:
        """The tensor and all tensors that it depends on, nearest first."""
        found, stack = {tensor: None}, [tensor]
        while stack:
            for one in self.operands(self.node(stack.pop())):
                if one not in found:
                    found[one] = None
                    stack.append(one)
        return list(found)

    def region(self, output: str, inputs: Sequence[str]) -> "Region":
        """The operations between tensors; the output may depend on nothing but them."""
        return Region(self, output, inputs)

    def fingerprint(self, tensor: str) -> str:
        """SHA-256 of everything that computes a tensor, but not of the names in it."""
        return self._fingerprint(tensor.partition(":")[0]) + ":" + (tensor.partition(":")[2] or "0")

    def _fingerprint(self, start: str) -> str:
        known: dict[str, str] = self._pruned.setdefault("fingerprints", {})
        stack = [start]
        while stack:
            name = stack[-1]
            node = self._nodes[name]
            before = self.operands(node)
            missing = [one.partition(":")[0] for one in before]
            missing = [one for one in missing if one not in known]
            if name in known or not missing:
                if name not in known:
                    attributes = {
                        key: _bytes_of(value)
                        for key, value in node.attr.items()
                        if not key.startswith("_")
                    }
                    label = self._arguments.get(name, name) if node.op == "Placeholder" else ""
                    parts = [node.op, label, repr(sorted(attributes.items()))]
                    parts += [
                        known[one.partition(":")[0]] + ":" + one.partition(":")[2] for one in before
                    ]
                    known[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
                stack.pop()
                continue
            stack += missing
        return known[start]

    # Values -----------------------------------------------------------------------------------

    def run(
        self, feeds: Mapping[str, np.ndarray], fetches: Sequence[str], *, precise: bool = False
    ) -> list[np.ndarray]:
        """Values of tensors when others have given values.

        Args:
            feeds: Maps tensors to arrays.
            fetches: Tensors.
            precise: Whether to compute in float64 instead of float32.
        """
        import tensorflow as tf

        key = (tuple(sorted(feeds)), tuple(fetches), precise)
        if key not in self._pruned:
            graph = self._imported(precise)
            self._pruned[key] = graph.prune(
                [graph.graph.get_tensor_by_name(name) for name in sorted(feeds)],
                [graph.graph.get_tensor_by_name(name) for name in fetches],
            )
        function = self._pruned[key]
        arguments = [
            tf.constant(feeds[name], dtype=tensor.dtype)
            for name, tensor in zip(sorted(feeds), function.inputs, strict=True)
        ]
        with tf.device("cpu:0"):
            return [np.asarray(value) for value in function(*arguments)]

    def differentiable(self, feeds: Sequence[str], fetch: str) -> Any:
        """A function of TensorFlow tensors in float64, in the order of `feeds`."""
        graph = self._imported(True)
        return graph.prune(
            [graph.graph.get_tensor_by_name(name) for name in feeds],
            graph.graph.get_tensor_by_name(fetch),
        )

    def _imported(self, precise: bool) -> Any:
        import tensorflow as tf

        if precise not in self._pruned:
            definition = _widened(self._definition) if precise else self._definition
            self._pruned[precise] = tf.compat.v1.wrap_function(
                lambda: tf.compat.v1.import_graph_def(definition, name=""), []
            )
        return self._pruned[precise]

    @functools.cached_property
    def dtypes(self) -> Mapping[str, str]:
        """Maps the name of every tensor to its dtype."""
        graph = self._imported(False).graph
        return {
            tensor.name: tensor.dtype.base_dtype.name
            for operation in graph.get_operations()
            for tensor in operation.outputs
        }

    def check_dtypes(self) -> None:
        """Refuse graphs with half precision, strings or resources."""
        known = {"float32", "float64", "int32", "int64", "bool"}
        for name, dtype in self.dtypes.items():
            require(dtype in known, f"no independent check of {dtype} in {name!r}")


class Region:
    """The operations between some tensors and another one that depends on nothing else.

    Args:
        served: The graph.
        output: The tensor that is computed.
        inputs: The tensors that it is computed from.

    Attributes:
        operations: Types of the operations, each with its name, without those on constants.
        constants: Floating-point tensors of the region that depend on no input, by name.
    """

    def __init__(self, served: ServedFunction, output: str, inputs: Sequence[str]):
        self.served, self.output, self.inputs = served, output, tuple(inputs)
        self.operations: dict[str, Any] = {}
        names: set[str] = set()
        stack, seen = [output], set(inputs)
        while stack:
            tensor = stack.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            node = served.node(tensor)
            if not served.reached(tensor):
                self._add_constants(tensor, names)
                continue
            require(
                node.op != "Placeholder",
                f"{output!r} depends on input {node.name!r} past the inputs of its step",
            )
            self.operations[node.name] = node
            stack += served.operands(node)
        self._names = sorted(names)

    def _add_constants(self, tensor: str, names: set[str]) -> None:
        stack = [tensor]
        while stack:
            name = stack.pop()
            if name in names:
                continue
            if "float" in self.served.dtypes[name]:
                names.add(name)
            stack += self.served.operands(self.served.node(name))

    @functools.cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """Values of its constants, by the SHA-256 of their entries in float64."""
        values = self.served.run({}, self._names) if self._names else []
        return {hash_of(value): np.asarray(value, np.float64) for value in values}

    def check_operations(self, allowed: frozenset[str], layer: str) -> None:
        """Refuse operations that do not belong to a kind of step.

        Also refuse integers and booleans that are computed from floating-point tensors, other than
        shapes.
        """
        for name, node in self.operations.items():
            require(
                node.op in allowed,
                f"{layer}: operation {node.op} at {name!r} does not belong there",
            )
            if node.op in _INTEGERS:
                continue
            output = self.served.dtypes.get(f"{name}:0", "")
            before = [self.served.dtypes[one] for one in self.served.operands(node)]
            if "float" not in output or node.op in _OF_INTEGERS:
                require(
                    not any("float" in dtype for dtype in before),
                    f"{layer}: operation {node.op} at {name!r} decides by its input",
                )

    def product(self) -> str:
        """The name of a product of two tensors that both change; empty if there is none."""
        products = ("Mul", "MatMul", "BatchMatMulV2", "Einsum", "Conv2D", "Square")
        for name, node in self.operations.items():
            changing = [self._changes(one) for one in self.served.operands(node)]
            if node.op in products and sum(changing) > 1:
                return name
            if node.op in ("RealDiv", "DivNoNan") and changing[1]:
                return name
        return ""

    def of_changing(self, names: frozenset[str]) -> str:
        """The name of an operation of these types on a tensor that changes, or empty."""
        for name, node in self.operations.items():
            if node.op in names and any(map(self._changes, self.served.operands(node))):
                return name
        return ""

    def _changes(self, tensor: str) -> bool:
        """Whether a tensor depends on a floating-point input of the region, not on masks alone."""
        return tensor in self._changing or tensor.partition(":")[0] in self._changing

    @functools.cached_property
    def _changing(self) -> set[str]:
        found = {one for one in self.inputs if "float" in self.served.dtypes[one]}
        size = 0
        while size < len(found):
            size = len(found)
            for name, node in self.operations.items():
                operands = self.served.operands(node)
                if any(one in found or one.partition(":")[0] in found for one in operands):
                    found.add(name)
        return found


def hash_of(array: np.ndarray) -> str:
    """SHA-256 of the entries in float64, row by row."""
    entries = np.ascontiguousarray(np.asarray(array, np.float64)).astype("<f8")
    return hashlib.sha256(entries.tobytes()).hexdigest()


def _bytes_of(attribute: Any) -> bytes:
    """An attribute of an operation as bytes; those of an array do not depend on its encoding."""
    import tensorflow as tf

    if not attribute.HasField("tensor"):
        return attribute.SerializeToString(deterministic=True)
    array = tf.make_ndarray(attribute.tensor)
    return f"{array.dtype} {array.shape} ".encode() + array.tobytes()


def _tensor(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _widened(definition: Any) -> Any:
    """The same graph in float64."""
    import tensorflow as tf

    narrow, wide = tf.float32.as_datatype_enum, tf.float64.as_datatype_enum
    copy = type(definition)()
    copy.CopyFrom(definition)
    for node in copy.node:
        # The names of custom gradients are those of another process.
        if "_gradient_op_type" in node.attr:
            del node.attr["_gradient_op_type"]
        for key, attribute in node.attr.items():
            if attribute.type == narrow:
                attribute.type = wide
            for index, kind in enumerate(attribute.list.type):
                if kind == narrow:
                    attribute.list.type[index] = wide
            if key == "value" and attribute.tensor.dtype == narrow:
                array = tf.make_ndarray(attribute.tensor).astype(np.float64)
                attribute.tensor.CopyFrom(tf.make_tensor_proto(array))
    return copy
