"""A process that serves many SavedModels without Keras and without this package.

As a program it reads one request per line from its standard input. As a module it starts that
program, and reads saved graphs without running them.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback
from typing import Any

import numpy as np

BLOCKED = ("keras", "keras_lipattn", "tf_keras")


class ServingClient:
    """One process for many models, because TensorFlow takes seconds to start."""

    def __init__(self):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._log = tempfile.TemporaryFile("w+")
        self._process: Any = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def serve(self, model, requests):
        """Answer `{signature: {input: array}}` with `{signature: {output: array}}`."""
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = f"{folder}/asked.npz", f"{folder}/answered.npz"
            arrays: dict[str, Any] = {
                f"{signature}:{name}": np.asarray(array)
                for signature, inputs in requests.items()
                for name, array in inputs.items()
            }
            np.savez(asked, **arrays)
            line = json.dumps([os.fspath(model), asked, answered])
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
            if reply != "served\n":
                self._log.seek(0)
                raise RuntimeError(f"The client failed. Received: {self._log.read()[-3000:]}")
            answers = {}
            with np.load(answered) as content:
                for key in content.files:
                    signature, name = key.split(":", 1)
                    answers.setdefault(signature, {})[name] = content[key]
            return answers

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


def graph_of(model):
    """The `GraphDef` of a SavedModel folder."""
    from tensorflow.core.protobuf import saved_model_pb2

    content = saved_model_pb2.SavedModel()
    content.ParseFromString(pathlib.Path(model, "saved_model.pb").read_bytes())
    return content.meta_graphs[0].graph_def


def operations_of(model):
    """Types of all operations of a SavedModel, except those that save and restore."""
    graph = graph_of(model)
    nodes = [node.op for node in graph.node]
    for function in graph.library.function:
        if (
            "traced_save" not in function.signature.name
            and "restore" not in function.signature.name
        ):
            nodes += [node.op for node in function.node_def]
    return nodes


def operations_of_signature(model, signature):
    """Types of the operations of the function behind a signature."""
    (function,) = [
        function
        for function in graph_of(model).library.function
        if function.signature.name.startswith(f"__inference_{signature}_")
    ]
    return [node.op for node in function.node_def]


def variable_names(model):
    """Names of the variables of a SavedModel."""
    import tensorflow as tf

    listed = tf.train.list_variables(str(pathlib.Path(model, "variables", "variables")))
    return [name for name, _ in listed if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]


def in_float64(model, signature):
    """A signature of a SavedModel in float64 arithmetic, with its float32 constants.

    Returns:
        A function from named arrays to a list of arrays, in the order of the outputs.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2_as_graph,
    )

    float32 = tf.float32.as_datatype_enum
    loaded = tf.saved_model.load(str(model))
    function = loaded.signatures[signature]
    frozen, graph = convert_variables_to_constants_v2_as_graph(function)
    for node in graph.node:
        for attribute in node.attr.values():
            kind = attribute.WhichOneof("value")
            if kind == "type" and attribute.type == float32:
                attribute.type = tf.float64.as_datatype_enum
            if kind == "tensor" and attribute.tensor.dtype == float32:
                wide = tf.make_ndarray(attribute.tensor).astype(np.float64)
                attribute.tensor.CopyFrom(tf.make_tensor_proto(wide))
    names = list(function.structured_input_signature[1])
    inputs = {tensor.op.name: tensor.name for tensor in frozen.inputs}
    feeds = [next(inputs[op] for op in inputs if op in (n, f"{signature}_{n}")) for n in names]
    imported = tf.compat.v1.wrap_function(
        lambda: tf.graph_util.import_graph_def(graph, name=""), []
    )
    pruned = imported.prune(
        [imported.graph.get_tensor_by_name(name) for name in feeds],
        [imported.graph.get_tensor_by_name(tensor.name) for tensor in frozen.outputs],
    )

    def run(**arrays):
        wide = [
            np.asarray(
                arrays[name], np.float64 if np.asarray(arrays[name]).dtype.kind == "f" else None
            )
            for name in names
        ]
        return [tensor.numpy() for tensor in pruned(*map(tf.constant, wide))]

    return run


def main():
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    import tensorflow as tf

    kept: Any = (None, None)
    for line in sys.stdin:
        model, asked, answered = json.loads(line)
        try:
            written = os.stat(f"{model}/saved_model.pb")
            if kept[0] != (model, written.st_ino, written.st_mtime_ns):
                kept = (
                    (model, written.st_ino, written.st_mtime_ns),
                    tf.saved_model.load(model),
                )
            loaded = kept[1]
            answers = {}
            with np.load(asked) as content:
                calls = {}
                for key in content.files:
                    signature, name = key.split(":", 1)
                    calls.setdefault(signature, {})[name] = tf.constant(content[key])
            for signature, inputs in calls.items():
                for name, tensor in loaded.signatures[signature](**inputs).items():
                    wide = tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor
                    answers[f"{signature}:{name}"] = wide.numpy()
            if any(sys.modules[name] is not None for name in BLOCKED):
                raise RuntimeError("Keras was imported.")
            np.savez(answered, **answers)
            print("served", flush=True)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError, tf.errors.OpError):
            traceback.print_exc()
            print("failed", flush=True)


if __name__ == "__main__":
    main()
