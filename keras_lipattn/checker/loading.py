"""The signatures of an export, as TensorFlow for Python and as TensorFlow Serving load them."""

import pathlib
import uuid
from typing import Any

from keras_lipattn.checker import operations
from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.served_function import ServedFunction

_SIGNATURES = ({"serving_default"}, {"serving_default", "certified"})
_INITIALIZATION = "__saved_model_init_op"


def load(export: pathlib.Path) -> dict[str, ServedFunction]:
    """The signatures of an export by name, after a check that every runtime serves the same.

    A SavedModel holds its program twice. `tf.saved_model.load` reads the graph of objects and their
    functions. TensorFlow Serving, the C API and `saved_model_cli` read the signature definitions,
    and run the operations that restore and initialize the variables.
    """
    import tensorflow as tf

    _check_operations(export)
    try:
        loaded = tf.saved_model.load(str(export))
        found = {name: ServedFunction(loaded.signatures[name], name) for name in loaded.signatures}
        defined = _as_defined(export)
    except NotVerified:
        raise
    except Exception as error:
        raise NotVerified(f"TensorFlow cannot load it: {error}") from error
    for functions in (found, defined):
        require(set(functions) in _SIGNATURES, f"its signatures are {sorted(functions)}")
    require(set(found) == set(defined), "runtimes find different signatures in it")
    for name, function in found.items():
        function.check_dtypes()
        require(
            _content(function) == _content(defined[name]),
            f"TensorFlow Serving computes something else for the signature {name!r} than "
            "`tf.saved_model.load`",
        )
    return found


def _check_operations(export: pathlib.Path) -> None:
    """Refuse unknown operations before anything is loaded: a graph may read and write files."""
    from tensorflow.core.protobuf import saved_model_pb2

    program = saved_model_pb2.SavedModel()
    try:
        program.ParseFromString((export / "saved_model.pb").read_bytes())
    except Exception as error:
        raise NotVerified(f"saved_model.pb cannot be read: {error}") from error
    require(len(program.meta_graphs) == 1, "saved_model.pb does not hold one graph")
    graph = program.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    for node in nodes:
        require(node.op in operations.KNOWN, f"no independent check of operation {node.op}")


def _as_defined(export: pathlib.Path) -> dict[str, ServedFunction]:
    """The signatures as TensorFlow Serving loads them."""
    import tensorflow as tf
    from tensorflow.python.framework import convert_to_constants
    from tensorflow.python.util import deprecation

    v1 = tf.compat.v1
    on_cpu = v1.ConfigProto(device_count={"GPU": 0})
    with (
        deprecation.silence(),
        tf.Graph().as_default() as graph,
        v1.Session(config=on_cpu) as session,
    ):
        content = v1.saved_model.load(session, ["serve"], str(export))
        signatures = {
            name: signature
            for name, signature in content.signature_def.items()
            if name != _INITIALIZATION
        }
        outputs = {
            tensor.name.partition(":")[0]
            for signature in signatures.values()
            for tensor in signature.outputs.values()
        }
        frozen = convert_to_constants.convert_variables_to_constants_from_session_graph(
            session, graph.as_graph_def(), sorted(outputs)
        )
    _rename_functions(frozen)
    whole = v1.wrap_function(lambda: v1.import_graph_def(frozen, name=""), [])
    functions = {}
    for name, signature in signatures.items():
        given = {tensor.name: key for key, tensor in signature.inputs.items()}
        require(len(given) == len(signature.inputs), f"two inputs of {name} are one tensor")
        function = whole.prune(
            [whole.graph.get_tensor_by_name(tensor) for tensor in given],
            {
                key: whole.graph.get_tensor_by_name(tensor.name)
                for key, tensor in signature.outputs.items()
            },
        )
        functions[name] = ServedFunction(function, name, given)
    return functions


def _rename_functions(graph: Any) -> None:
    """Give the functions of a graph names that no other graph of this process has."""
    new = {
        function.signature.name: f"{function.signature.name}_{uuid.uuid4().hex}"
        for function in graph.library.function
    }
    for function in graph.library.function:
        function.signature.name = new[function.signature.name]
    del graph.library.gradient[:]
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        for node in nodes:
            for attribute in node.attr.values():
                called = [attribute.func] if attribute.HasField("func") else attribute.list.func
                for one in called:
                    one.name = new.get(one.name, one.name)


def _content(function: ServedFunction) -> tuple:
    """What a signature takes, and a fingerprint of each of its outputs."""
    outputs = {key: function.fingerprint(tensor) for key, tensor in function.outputs.items()}
    return function.specs, outputs
