"""Exports in ONNX Runtime, converted by tf2onnx and by Keras."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import export_cases as cases
from helpers.runtime_contract import MODELS, TOLERANCE, RuntimeContract, subject  # noqa: F401

from keras_lipattn.certification import Certificate
from keras_lipattn.layers import condensed

tf2onnx = pytest.importorskip("tf2onnx", reason="needs the extra `runtimes`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `runtimes`")
onnx = pytest.importorskip("onnx", reason="needs the extra `runtimes`")


def converted(subject, path):  # noqa: F811
    """A signature of a SavedModel in a file of ONNX with its certificate, as the guide has it."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(subject.path))
    certified = loaded.signatures["certified"]
    _, specs = certified.structured_input_signature
    function = tf.function(lambda *args: certified(**dict(zip(specs, args, strict=True))))
    signature = [tf.TensorSpec(s.shape, s.dtype, name) for name, s in specs.items()]
    model, _ = tf2onnx.convert.from_function(function, input_signature=signature)
    certificate = (subject.path / "assets.extra" / "certificate.json").read_text()
    onnx.helper.set_model_props(model, {"certificate": certificate})
    onnx.save(model, path)


class TestOnnxRuntime(RuntimeContract):
    def start(self, subject, folder):  # noqa: F811
        converted(subject, folder / "model.onnx")
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        names = [output.name for output in session.get_outputs()]
        return lambda arrays: dict(zip(names, session.run(None, dict(arrays)), strict=True))

    def certificate(self, subject, folder):  # noqa: F811
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return Certificate.from_json(session.get_modelmeta().custom_metadata_map["certificate"])


# Keras adjusts tf2onnx to new releases of numpy.
@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")
@pytest.mark.parametrize("is_condensed", [False, True])
@pytest.mark.parametrize("name", ["softmax over sequences", "logits with a mask", "without biases"])
def test_onnx_export_of_keras_equals_keras(name, is_condensed, tmp_path):
    model = MODELS[name][0]()
    with condensed(model) if is_condensed else contextlib.nullcontext():
        # Keras exports only models that have been called.
        model(
            keras.tree.map_structure(lambda x: np.ones((1, 3, *x.shape[2:]), x.dtype), model.input)
        )
        model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        names = [entry.name for entry in session.get_inputs()]
        for batch, length in [(0, cases.LENGTH), (3, 1), (5, cases.LENGTH), (1000, 4)]:
            x = cases.tokens(batch, length)
            arrays = {"tokens": x, "valid": x[..., 0] > -1.0}
            request = {name: arrays[name] for name in names}
            (answer,) = session.run(None, request)
            assert len(answer) == batch
            if batch == 0:
                continue
            wanted = np.asarray(model(request if len(names) > 1 else x, training=False))
            assert answer.shape == wanted.shape
            assert np.abs(answer - wanted).max() <= TOLERANCE * max(1.0, np.abs(wanted).max())
