"""Exports in LiteRT, converted by TensorFlow."""

import pytest
import tensorflow as tf
from helpers.runtime_contract import RuntimeContract, subject  # noqa: F401

interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="needs `runtimes`")


class TestLiteRT(RuntimeContract):
    def start(self, subject, folder):  # noqa: F811
        converter = tf.lite.TFLiteConverter.from_saved_model(
            str(subject.path), signature_keys=["certified"]
        )
        (folder / "model.tflite").write_bytes(converter.convert())
        model = interpreter.Interpreter(str(folder / "model.tflite"))
        assert list(model.get_signature_list()) == ["certified"]
        runner = model.get_signature_runner("certified")
        return lambda arrays: runner(**arrays)
