"""The exported graph: constants instead of norms, and no state of training."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import export_cases as cases
from helpers.serving_client import operations_of, operations_of_signature, variable_names
from keras import layers

import keras_lipattn as lip
from keras_lipattn.export import ExportError, export_saved_model

_DECOMPOSITIONS = {"Svd", "SelfAdjointEig", "SelfAdjointEigV2", "Eig", "Cholesky", "Qr"}
_LOOPS = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase"}
_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of the same classifier with caps and without."""
    folder = tmp_path_factory.mktemp("exports")
    with cases.one_serving_process():
        return {
            name: export_saved_model(cases.classifier(capped), folder / name, verbose=False).path
            for name, capped in (("capped", True), ("free", False))
        }


@pytest.mark.parametrize("name", ["capped", "free"])
def test_no_decomposition_and_no_loop(exports, name):
    operations = set(operations_of(exports[name]))
    assert "MatMul" in operations
    assert not operations & (_DECOMPOSITIONS | _LOOPS)


@pytest.mark.parametrize("signature", ["serving_default", "certified"])
def test_caps_cost_no_product(exports, signature):
    counts = [
        collections.Counter(
            op for op in operations_of_signature(exports[name], signature) if op in _PRODUCTS
        )
        for name in ("capped", "free")
    ]
    assert counts[0] == counts[1]
    # The layer before, two projections of tokens and of their center, scores, mixing, the last one.
    assert counts[0].total() <= 8


@pytest.mark.parametrize("signature", ["serving_default", "certified"])
def test_no_product_of_weights_alone(exports, signature):
    loaded = tf.saved_model.load(str(exports["capped"]))
    (concrete,) = [loaded.signatures[signature]]
    frozen = tf.function(concrete).get_concrete_function(**concrete.structured_input_signature[1])
    functions = [f.graph for f in _functions(frozen.graph)]
    products = 0
    for graph in functions:
        captured = {tensor.name for tensor in graph.inputs if tensor.dtype == tf.resource}
        from_data = {t.name for t in graph.inputs} - captured
        for operation in graph.get_operations():
            moving = [tensor.name for tensor in operation.inputs if tensor.name in from_data]
            if operation.type in _PRODUCTS:
                products += 1
                assert moving, f"{operation.name} multiplies weights"
            if moving:
                from_data |= {tensor.name for tensor in operation.outputs}
    assert products


def _functions(graph):
    for operation in graph.get_operations():
        if "PartitionedCall" in operation.type:
            inner = graph._get_function(operation.get_attr("f").name)
            yield inner
            yield from _functions(inner.graph)


def test_neither_raw_kernels_nor_running_vectors_are_saved(exports):
    names = " ".join(variable_names(exports["capped"]))
    for kept in ("condensed_projection", "condensed_output", "output_bias"):
        assert kept in names
    for left in ("query_kernel", "value_kernel", "vector", "running", "penalty", "seed"):
        assert left not in names
    dense = [name for name in names.split() if "spectral_dense" in name]
    assert {name.rpartition(".S")[2].partition("/")[0] for name in dense} == {
        "condensed_output",
        "bias",
    }


class Traced(layers.Layer):
    """Runs the first trace of the inner layer in every later call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = lip.SpectralDense(3)

    def build(self, input_shape):
        self.inner.build(input_shape)

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32)])
    def call(self, inputs):
        return self.inner(inputs)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 3)


def test_a_layer_behind_an_older_trace_is_refused(tmp_path):
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, Traced()(inputs))
    model(np.ones((2, 4), np.float32))
    with pytest.raises(ExportError, match=r"traced before the export.*Received: layer"):
        export_saved_model(model, tmp_path / "model", allow_uncertified=True, verbose=False)
    assert not (tmp_path / "model").exists()
