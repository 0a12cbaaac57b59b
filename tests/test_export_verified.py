"""`verify_export` accepts what was exported, and refuses what was changed afterwards."""

import ast
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import export_cases as cases
from keras import layers
from tensorflow.core.protobuf import saved_model_pb2

import keras_lipattn as lip
import keras_lipattn.checker
from keras_lipattn.export import export_saved_model, verify_export

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "verify_export.py"
EXTRA = "assets.extra"
LENGTH, WIDTH = 6, 8


def classifier(seed=0):
    """A classifier of tokens of any length up to 6."""
    inputs = keras.Input((None, WIDTH), name="tokens")
    x = layers.Dense(WIDTH, activation="relu", name="first")(inputs)
    y = lip.L2MultiHeadAttention(2, 4, max_sequence_length=LENGTH, name="attention")(
        lip.CenterNormalization(name="center")(x)
    )
    x = lip.Residual(alpha=0.25, name="residual")([x, y])
    x = layers.LayerNormalization(epsilon=0.1, name="normalization")(x)
    x = layers.GlobalAveragePooling1D()(x)
    outputs = layers.Dense(3, activation="softmax", name="logits")(x)
    return randomized(keras.Model(inputs, outputs, name="classifier"), seed)


def dot_products(seed=0):
    """Attention on tokens that are bounded by `input_radius` alone."""
    inputs = keras.Input((4, WIDTH), name="tokens")
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True)
    x = layers.Dense(4)(layers.Flatten()(layers.Add()([inputs, x])))
    return randomized(keras.Model(inputs, x), seed)


def integers(seed=0):
    """A sigmoid over integers that are padded with 0."""
    inputs = keras.Input((5,), dtype="int32", name="ids")
    x = lip.PositionEmbedding()(layers.Embedding(11, WIDTH, mask_zero=True)(inputs))
    x = lip.Residual()([x, lip.ScaledCosineAttention(2, 4, sliding_window=2)(x)])
    x = layers.Dense(4, activation="gelu")(layers.GlobalAveragePooling1D()(x))
    return randomized(keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x)), seed)


def pooled(seed=0):
    """No classifier, and layers that move, select and average entries."""
    inputs = keras.Input((6, 4))
    x = layers.MaxPooling1D(2, strides=1)(layers.Permute((2, 1))(inputs))
    x = layers.AveragePooling1D(2, padding="same")(layers.Reshape((6, 3))(layers.ReLU()(x)))
    x = layers.RMSNormalization(epsilon=0.1)(layers.EinsumDense("btd,df->btf", (None, 4))(x))
    x = lip.MaxMin()(layers.Subtract()([x, layers.Dropout(0.5)(layers.Activation("silu")(x))]))
    return randomized(keras.Model(inputs, x), seed)


def orthogonal(seed=0):
    """Images through layers with constants of their own."""
    inputs = keras.Input((4, 4, 2))
    x = lip.OrthogonalDense(12)(lip.SpaceToDepth(2)(inputs))
    x = lip.OrthogonalDense(6, activation="tanh")(lip.HalfAbs()(x))
    x = lip.NormPooling()(lip.NormPooling((2, 1))(x))
    return randomized(keras.Model(inputs, lip.NormalizedDense(3)(lip.MaxMin()(x))), seed)


def randomized(model, seed) -> Any:
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.normal(size=variable.shape) / np.sqrt(max(1, variable.shape[0]))
        variable.assign(0.2 + noise)
    return model


def export(model, folder, **options):
    with cases.one_serving_process():
        return export_saved_model(model, folder, verbose=False, **options)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (classifier, {}),
        (dot_products, {"input_radius": 2.0}),
        (integers, {}),
        (pooled, {}),
        (orthogonal, {}),
    ],
)
def test_an_untouched_export_is_verified(tmp_path, model, options, norm):
    certificate, path = export(model(), tmp_path / "model", norm=norm, **options)
    found = verify_export(path)
    assert found, found
    assert found.certified == certificate.total
    assert found.recomputed == pytest.approx(certificate.total, rel=1e-9, abs=0.0)


def test_layers_without_a_check_are_named(tmp_path):
    inputs = keras.Input((6, 4))
    x = layers.Conv1D(3, 2, name="patches")(inputs)
    _, path = export(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))), tmp_path / "model")
    found = verify_export(path)
    assert not found and found.reason == "no independent check of Conv1D 'patches'"


# Tampering --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {
        "one": export(classifier(0), folder / "one").path,
        "other": export(classifier(1), folder / "other").path,
        "small": export(dot_products(), folder / "small", input_radius=2.0).path,
    }


@pytest.fixture
def one(exports, tmp_path):
    return pathlib.Path(shutil.copytree(exports["one"], tmp_path / "1"))


@pytest.fixture
def small(exports, tmp_path):
    return pathlib.Path(shutil.copytree(exports["small"], tmp_path / "1"))


def edit(path, name, change):
    """Edit a JSON record of an export."""
    file = path / EXTRA / name
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=2) + "\n")


def forge(path):
    """Write all hashes anew, as an attacker who may write to the folder would."""

    def certificate(content):
        derived = ("schema", "vacuous", "reasons", "proposals", "content_hash")
        kept = {key: value for key, value in content.items() if key not in derived}
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
        content["content_hash"] = hashlib.sha256(text.encode()).hexdigest()

    edit(path, "certificate.json", certificate)
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            files[file.relative_to(path).as_posix()] = {
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "size": file.stat().st_size,
            }
    edit(path, "manifest.json", lambda content: content.update(files=files))


def edit_variables(path, change):
    """Rewrite the variables, and the hashes of their arrays in the proof."""
    prefix = str(path / "variables" / "variables")
    reader = tf.train.load_checkpoint(prefix)
    names = sorted(reader.get_variable_to_shape_map())
    tensors, hashes = [], {}
    for name in names:
        value = reader.get_tensor(name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            changed = change(name, value).astype(value.dtype)
            hashes[digest(value)] = digest(changed)
            value = changed
        tensors.append(tf.constant(value))
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors
    )

    def proof(content):
        for step in content["steps"]:
            for array in step["arrays"].values():
                array["sha256"] = hashes.get(array["sha256"], array["sha256"])

    edit(path, "proof.json", proof)


def digest(array):
    return hashlib.sha256(np.asarray(array, "<f8").tobytes()).hexdigest()


def edit_graph(path, change):
    """Edit the functions of a SavedModel; `change` gets each function and node."""
    program = saved_model_pb2.SavedModel()
    file = path / "saved_model.pb"
    program.ParseFromString(file.read_bytes())
    count = 0
    for function in program.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            count += bool(change(function.signature.name, node))
    assert count, "nothing was changed"
    file.write_bytes(program.SerializeToString())


def set_constant(node, function):
    array = tf.make_ndarray(node.attr["value"].tensor)
    changed = np.asarray(function(array), array.dtype)
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(changed))
    return True


def step_of(content, layer):
    (step,) = (step for step in content["steps"] if layer in step["layer"])
    return step


def in_proof(layer, change):
    def tamper(path, exports):
        edit(path, "proof.json", lambda content: change(step_of(content, layer)))
        forge(path)

    return tamper


def in_certificate(change):
    def tamper(path, exports):
        edit(path, "certificate.json", change)
        forge(path)

    return tamper


def _swap_variables(path, exports):
    shutil.copytree(exports["other"] / "variables", path / "variables", dirs_exist_ok=True)


def _swap_variables_and_forge(path, exports):
    _swap_variables(path, exports)
    forge(path)


def _scale_variables(path, exports):
    edit_variables(path, lambda name, value: 3.0 * value if "attention" in name else value)
    forge(path)


def _nan(path, exports):
    def change(name, value):
        return np.where(np.arange(value.size).reshape(value.shape) == 0, np.nan, value)

    edit_variables(path, lambda name, value: change(name, value) if "first" in name else value)
    forge(path)


def _divide(content, factor=100.0):
    content["total"] /= factor
    content["log10"] -= np.log10(factor)


def _divide_all(content):
    _divide(content)
    content["pairwise_constants"] = (np.array(content["pairwise_constants"]) / 100.0).tolist()


def _divide_without_hash(path, exports):
    edit(path, "certificate.json", _divide)


def _divide_with_manifest_only(path, exports):
    stated = json.loads((path / EXTRA / "certificate.json").read_text())["content_hash"]
    edit(path, "certificate.json", _divide)
    forge(path)
    edit(path, "certificate.json", lambda content: content.update(content_hash=stated))
    file = path / EXTRA / "certificate.json"
    entry = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size": file.stat().st_size}
    name = f"{EXTRA}/certificate.json"
    edit(path, "manifest.json", lambda content: content["files"].update({name: entry}))


def _certificate_of_other(path, exports):
    shutil.copy(exports["other"] / EXTRA / "certificate.json", path / EXTRA)
    forge(path)


def _halve_pairs_of_signature(path, exports):
    pairs = np.array(
        json.loads((path / EXTRA / "certificate.json").read_text())["pairwise_constants"]
    )

    def change(function, node):
        if node.op != "Const" or not node.attr["value"].tensor.tensor_shape.dim:
            return False
        array = tf.make_ndarray(node.attr["value"].tensor)
        if array.shape != pairs.shape or not np.allclose(array, pairs, rtol=1e-5):
            return False
        return set_constant(node, lambda array: array * (1.0 - 0.1 * np.eye(3)[::-1]))

    edit_graph(path, change)
    forge(path)


def _other_default(path, exports):
    def change(function, node):
        if "serving_default" not in function or not node.name.endswith("residual_1/mul/x"):
            return False
        return set_constant(node, lambda array: 2.0 * array)

    edit_graph(path, change)
    forge(path)


def _other_epsilon(path, exports):
    def change(function, node):
        small = node.op == "Const" and "normalization" in node.name
        if not small or node.attr["value"].tensor.dtype != tf.float32.as_datatype_enum:
            return False
        array = tf.make_ndarray(node.attr["value"].tensor)
        return array.shape == () and set_constant(node, lambda array: 0.01 * array)

    edit_graph(path, change)
    forge(path)


def _bypass(path, exports):
    """The residual adds the input of the model in place of its branch."""

    def change(function, node):
        if not node.name.endswith("normalization_1/add_2"):
            return False
        node.input[0] = "tokens"
        return True

    edit_graph(path, change)
    forge(path)


def _write_a_file(path, exports):
    def change(function, node):
        if not node.op == "NoOp":
            return False
        node.op = "WriteFile"
        return True

    edit_graph(path, change)
    forge(path)


def edit_program(path, change):
    """Edit the parts of a SavedModel that TensorFlow Serving reads and Python does not."""
    program = saved_model_pb2.SavedModel()
    file = path / "saved_model.pb"
    program.ParseFromString(file.read_bytes())
    change(program.meta_graphs[0])
    file.write_bytes(program.SerializeToString())
    forge(path)


def _margin_as_radius(path, exports):
    def change(program):
        outputs = program.signature_def["certified"].outputs
        outputs["radius"].name = outputs["margin"].name

    edit_program(path, change)


def _initialize(path, exports):
    """The operation that initializes the model assigns another bias."""

    def change(program):
        nodes = program.graph_def.node
        value = nodes.add(name="other", op="Const")
        value.attr["value"].tensor.CopyFrom(
            tf.make_tensor_proto(np.array([100.0, 0.0, 0.0], np.float32))
        )
        value.attr["dtype"].type = tf.float32.as_datatype_enum
        assign = nodes.add(name="assign", op="AssignVariableOp", input=["logits/bias", "other"])
        assign.attr["dtype"].type = tf.float32.as_datatype_enum
        target = program.signature_def["__saved_model_init_op"].outputs
        name = target["__saved_model_init_op"].name
        (node,) = (node for node in nodes if node.name == name)
        node.input.append("^assign")

    edit_program(path, change)


def _restore_others(path, exports):
    """The operation that restores the variables exchanges two of them."""

    def change(program):
        for function in program.graph_def.library.function:
            for node in function.node_def:
                if "restore" in function.signature.name and node.name.endswith("tensor_names"):
                    names = [name.decode() for name in node.attr["value"].tensor.string_val]
                    first, second = (
                        next(i for i, name in enumerate(names) if f"center.S{part}" in name)
                        for part in ("beta", "gamma")
                    )
                    names[first], names[second] = names[second], names[first]
                    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(names))

    edit_program(path, change)


def replace_operation(function, node, op, output):
    """Replace an operation by one with the same inputs and attributes."""
    old = f"{node.name}:{ {'Identity': 'output', 'Softmax': 'softmax'}[node.op] }:0"
    node.op = op
    for one in function.node_def:
        one.input[:] = [output if name == old else name for name in one.input]
    for key, name in list(function.ret.items()):
        function.ret[key] = output if name == old else name


def in_function(signature, change):
    """Edit the function of a signature."""

    def tamper(path, exports):
        def edit_functions(program):
            for function in program.graph_def.library.function:
                if f"inference_{signature}" in function.signature.name:
                    change(function, {node.name: node for node in function.node_def})

        edit_program(path, edit_functions)

    return tamper


def _zeros(name):
    return in_function(
        "certified",
        lambda function, nodes: replace_operation(
            function, nodes[name], "ZerosLike", f"{name}:y:0"
        ),
    )


def _sigmoid_for_softmax(function, nodes):
    (name,) = (name for name in nodes if name.endswith("Softmax") and "logits" in name)
    replace_operation(function, nodes[name], "Sigmoid", f"{name}:y:0")


def insert(function, consumer, build):
    """Put operations before the first input of one; `build` returns their last tensor."""

    def constant(name, value):
        node = function.node_def.add(name=name, op="Const")
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        return f"{name}:output:0"

    def apply(name, op, inputs, output, integers=""):
        node = function.node_def.add(name=name, op=op, input=inputs)
        node.attr["T"].type = tf.float32.as_datatype_enum
        if integers:
            node.attr[integers].type = tf.int32.as_datatype_enum
        return node, f"{name}:{output}:0"

    consumer.input[0] = build(consumer.input[0], constant, apply)


def _add_a_product_of_entries(function, nodes):
    """`x + prod_i (x_i / 50)^20`, which is `x` for all small inputs."""

    def build(x, constant, apply):
        _, small = apply("small", "Mul", [x, constant("scale", np.float32(0.02))], "z")
        copies = constant("copies", np.array([1, 20], np.int32))
        _, many = apply("many", "Tile", [small, copies], "output", "Tmultiples")
        axis = constant("axis", np.array([1], np.int32))
        node, product = apply("product", "Prod", [many, axis], "output", "Tidx")
        node.attr["keep_dims"].b = True
        return apply("sum", "AddV2", [x, product], "z")[1]

    (name,) = (name for name in nodes if name.endswith("BiasAdd") and "logits" in name)
    insert(function, nodes[name], build)


def _clip_far_away(function, nodes):
    """`max(x, -1000)`, which is `x` for all small inputs."""

    def build(x, constant, apply):
        return apply("clip", "Maximum", [x, constant("far", np.float32(-1000.0))], "z")[1]

    (name,) = (name for name in nodes if name.endswith("Mean") and "pooling" in name)
    insert(function, nodes[name], build)


def in_both(change):
    """Edit the functions of both signatures."""

    def tamper(path, exports):
        for signature in ("certified", "serving_default"):
            in_function(signature, change)(path, exports)

    return tamper


def _smaller_in_record(path, exports):
    edit(path, "export.json", lambda content: content.update(constant=1e-3))
    forge(path)


def _longer_in_signature(path, exports):
    def change(function, node):
        if node.op != "Const" or not node.name.startswith("LessEqual"):
            return False
        array = tf.make_ndarray(node.attr["value"].tensor)
        return array.dtype.kind == "i" and set_constant(node, lambda array: 10 * array)

    edit_graph(path, change)
    forge(path)


def _link(path, exports):
    file = path / "variables" / "variables.index"
    target = path.parent / "variables.index"
    file.rename(target)
    file.symlink_to(target)


def _drop_step(path, exports):
    def change(content):
        content["steps"] = [step for step in content["steps"] if "attention" not in step["layer"]]

    edit(path, "proof.json", change)
    forge(path)


def _smaller_array(step):
    # The output bias, in place of the kernel.
    step["arrays"]["kernel"] = step["arrays"]["bias"]


TAMPERINGS = {
    "variables of another export": (_swap_variables, "variables.* has another SHA-256"),
    "the same with a new manifest": (_swap_variables_and_forge, "no array with the SHA-256"),
    "scaled weights": (_scale_variables, "served weights give the total"),
    "NaN weights": (_nan, "is not finite"),
    "a smaller total": (_divide_without_hash, "certificate.json has another"),
    "the same with a new manifest ": (_divide_with_manifest_only, "own hash"),
    "the same with all hashes": (in_certificate(_divide_all), "served weights give the total"),
    "a total without its logarithm": (
        in_certificate(lambda c: c.update(total=0.1)),
        "not 10 to the power",
    ),
    "a negative total": (
        in_certificate(lambda c: c.update(total=-1.0)),
        "total of the certificate",
    ),
    "a total that is a text": (
        in_certificate(lambda c: c.update(total="0.1")),
        "total of the certifi",
    ),
    "pairs of zero": (
        in_certificate(lambda c: c.update(pairwise_constants=np.zeros((3, 3)).tolist())),
        "for classes 0 and 1",
    ),
    "no pairs": (in_certificate(lambda c: c.update(pairwise_constants=[])), "other classes"),
    "certificate of another export": (_certificate_of_other, "served weights give the total"),
    "another norm": (
        in_certificate(lambda c: c["threat_model"].update(norm="token")),
        "served weights give the total",
    ),
    "more tokens": (
        in_certificate(lambda c: c["threat_model"].update(max_tokens=64)),
        "served weights give the total",
    ),
    "a local certificate": (
        in_certificate(lambda c: c["threat_model"].update(radius=1.0, center="x")),
        "local",
    ),
    "constants of the signature": (_halve_pairs_of_signature, "gives radius"),
    "length of the signature": (_longer_in_signature, "gives radius .* for longer inputs"),
    "another serving_default": (_other_default, "does not compute the logits"),
    "another epsilon in the graph": (_other_epsilon, "does not compute|differs from"),
    "a way around layers": (_bypass, "depends on input 'tokens'|does not compute"),
    "an operation that writes files": (_write_a_file, "operation WriteFile"),
    "another tensor for Serving": (_margin_as_radius, "Serving computes something else"),
    "another initialization for Serving": (_initialize, "Serving computes something else"),
    "other variables for Serving": (_restore_others, "Serving computes something else"),
    "another class": (_zeros("Identity"), "gives a class that is not"),
    "another margin": (_zeros("Identity_2"), "gives a margin that is not"),
    "another head": (
        in_function("serving_default", _sigmoid_for_softmax),
        "the head of `serving_default` is not",
    ),
    "a product of entries": (in_both(_add_a_product_of_entries), "operation Prod .* decides by"),
    "a clip in an average": (in_both(_clip_far_away), "it compares entries"),
    "another constant in the record": (_smaller_in_record, "export.json states constant=0.001"),
    "a missing file": (
        lambda path, exports: (path / "fingerprint.pb").unlink(),
        "fingerprint.pb is missing",
    ),
    "no manifest": (
        lambda path, exports: (path / EXTRA / "manifest.json").unlink(),
        "manifest.json cannot be read",
    ),
    "a name in the manifest": (
        lambda path, exports: edit(path, "manifest.json", lambda c: c.update(author="me")),
        "no manifest of schema",
    ),
    "a space in the manifest": (
        lambda path, exports: (path / EXTRA / "manifest.json").write_text(
            (path / EXTRA / "manifest.json").read_text().replace(": ", ":  ", 1)
        ),
        "written anew",
    ),
    "an extra file": (
        lambda path, exports: (path / "assets" / "more.txt").write_text("more"),
        "assets/more.txt is not in the manifest",
    ),
    "a link": (_link, "is a link"),
    "a truncated certificate": (
        lambda path, exports: (path / EXTRA / "certificate.json").write_text('{"schema": 2'),
        "certificate.json has another",
    ),
    "a step left out": (_drop_step, "no independent check of"),
    "a smaller array": (in_proof("first", _smaller_array), "another shape|no matrix|do not fit"),
    "another activation": (
        in_proof("first", lambda step: step["parameters"].update(activation="sigmoid")),
        "operation Relu .* does not belong there",
    ),
    "another epsilon": (
        in_proof("normalization'", lambda step: step["parameters"].update(epsilon=1.0)),
        "differs from a layer_normalization|no independent",
    ),
    "another mask": (
        in_proof("attention", lambda step: step["parameters"].update(causal=True)),
        "differs from a distance_attention",
    ),
    "other heads": (
        in_proof("attention", lambda step: step["parameters"].update(heads=4)),
        "differs from a distance_attention|sizes",
    ),
    "another branch weight": (
        in_proof("residual", lambda step: step["parameters"].update(coefficients=[1.0, 0.0])),
        "differs from a combination",
    ),
    "an unknown kind": (
        in_proof("first", lambda step: step.update(kind="trusted")),
        "no independent check of Dense 'first'",
    ),
    "a source in the middle": (
        in_proof("normalization'", lambda step: step.update(kind="source")),
        "looks up rows by a floating-point input",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_refused_with_its_reason(one, exports, name):
    tamper, reason = TAMPERINGS[name]
    tamper(one, exports)
    found = verify_export(one)
    assert not found
    assert re.search(reason, found.reason), found.reason


def test_a_forger_who_changes_nothing_is_verified(one, exports):
    forge(one)
    assert verify_export(one)


def test_a_source_is_a_lookup_and_no_layer_after_it(tmp_path):
    """Otherwise the certificate would leave out the layers before the source."""
    _, path = export(integers(), tmp_path / "model")
    in_proof("PositionEmbedding", lambda step: step.update(kind="source"))(path, None)
    found = verify_export(path)
    assert not found and "is no part of a lookup" in found.reason, found.reason


def test_exports_of_other_processes_with_the_same_names_are_verified(one):
    """Names of functions are unique in the process that exported them alone."""

    def change(program):
        for function in program.graph_def.library.function:
            if "restore" in function.signature.name:
                function.node_def.add(name="unused", op="NoOp")

    assert verify_export(one)
    edit_program(one, change)
    assert verify_export(one)


def test_a_larger_ball_needs_another_total(small, exports):
    in_certificate(lambda c: c["threat_model"].update(input_radius=8.0))(small, exports)
    found = verify_export(small)
    assert not found and "served weights give the total" in found.reason


def test_a_ball_of_the_signature_that_is_too_large_is_refused(small, exports):
    def change(function, node):
        if node.op != "Const" or node.attr["value"].tensor.dtype != tf.float32.as_datatype_enum:
            return False
        array = tf.make_ndarray(node.attr["value"].tensor)
        is_limit = array.shape == () and 1.9 < float(array) < 2.0 and "/" in node.name
        return is_limit and set_constant(node, lambda array: 10.0 * array)

    edit_graph(small, change)
    forge(small)
    found = verify_export(small)
    assert not found and "gives radius" in found.reason


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_are_refused(one, exports, seed):
    rng = np.random.default_rng(seed)
    files = sorted(file for file in one.rglob("*") if file.is_file())
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    position = int(rng.integers(len(content)))
    content[position] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))
    assert not verify_export(one)


# The checker and its command -------------------------------------------------------------------


def test_the_checker_imports_only_theorems_and_norms():
    folder = pathlib.Path(keras_lipattn.checker.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] != "keras", f"{path} imports {name}"
                if name.startswith("keras_lipattn"):
                    assert name.split(".")[1] in ("bounds", "checker", "linalg"), name


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=TOOL.parents[1],
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
    )


def test_the_command_has_three_exit_codes(one):
    accepted = run(one)
    assert (accepted.returncode, accepted.stdout.count("\n")) == (0, 1), accepted.stderr
    assert accepted.stdout.startswith("verified: ")
    (one / "more").write_text("more")
    refused = run(one)
    assert refused.returncode == 1
    assert refused.stdout == "not verified: file more is not in the manifest\n"
    assert run().returncode == 2 and run("--fast", one).returncode == 2
    assert run(one / "nothing").returncode == 1
