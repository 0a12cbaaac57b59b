"""Exports behind the interfaces of TensorFlow Serving: REST in both formats, and gRPC."""

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from helpers.runtime_contract import RuntimeContract, subject  # noqa: F401

grpc = pytest.importorskip("grpc")
predict_pb2 = pytest.importorskip(
    "tensorflow_serving.apis.predict_pb2", reason="needs the extra `runtimes`"
)
prediction_service_pb2_grpc = pytest.importorskip(
    "tensorflow_serving.apis.prediction_service_pb2_grpc"
)
serving_stand_in = pytest.importorskip("helpers.serving_stand_in")


@pytest.fixture(scope="module")
def server(subject):  # noqa: F811
    server = serving_stand_in.StandIn(subject.path.parent, "classifier")
    yield server
    server.close()


def fetch(url, content=None):
    """Status and JSON of an answer."""
    data = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def predict(server, **content):
    code, answer = fetch(f"{server.url}:predict", {"signature_name": "certified", **content})
    if code != 200:
        raise RuntimeError(answer["error"])
    return answer


class JsonContract(RuntimeContract):
    # In JSON an empty batch has no other sizes.
    refused = ("empty batch",)

    def test_an_empty_batch_is_an_error(self, subject, serve):  # noqa: F811
        with pytest.raises(RuntimeError):
            serve(subject.request(0))


class TestColumns(JsonContract):
    @pytest.fixture(scope="class")
    @classmethod
    def serve(cls, subject, server):  # noqa: F811
        def serve(arrays):
            inputs = {name: array.tolist() for name, array in arrays.items()}
            if len(inputs) == 1:
                (inputs,) = inputs.values()
            outputs = predict(server, inputs=inputs)["outputs"]
            return {n: np.array(outputs[n], spec["dtype"]) for n, spec in subject.outputs.items()}

        return serve


class TestRows(JsonContract):
    @pytest.fixture(scope="class")
    @classmethod
    def serve(cls, subject, server):  # noqa: F811
        def serve(arrays):
            columns = [array.tolist() for array in arrays.values()]
            rows = [dict(zip(arrays, row, strict=True)) for row in zip(*columns, strict=True)]
            if len(arrays) == 1:
                (rows,) = columns
            answers = predict(server, instances=rows)["predictions"]
            return {
                name: np.array([row[name] for row in answers], spec["dtype"])
                for name, spec in subject.outputs.items()
            }

        return serve


class TestGrpc(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def serve(cls, server):
        channel = grpc.insecure_channel(f"localhost:{server.grpc_port}")
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def serve(arrays):
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "classifier"
            request.model_spec.signature_name = "certified"
            for name, array in arrays.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            outputs = stub.Predict(request, timeout=60).outputs
            return {name: tf.make_ndarray(proto) for name, proto in outputs.items()}

        yield serve
        channel.close()


def test_the_server_lists_the_signatures_and_the_version(subject, server):  # noqa: F811
    code, status = fetch(server.url)
    assert code == 200
    (version,) = status["model_version_status"]
    assert (version["version"], version["state"]) == ("1", "AVAILABLE")
    for url in (server.url, f"{server.url}/versions/1"):
        code, found = fetch(f"{url}/metadata")
        assert code == 200
        signatures = found["metadata"]["signature_def"]["signature_def"]
        assert {"certified", "serving_default"} <= set(signatures)
        assert set(signatures["certified"]["outputs"]) == set(subject.outputs)


def test_wrong_requests_are_errors_in_json(subject, server):  # noqa: F811
    inputs = {name: array.tolist() for name, array in subject.request(2).items()}
    good = {"signature_name": "certified", "inputs": inputs}
    assert fetch(f"{server.url}/versions/1:predict", good)[0] == 200
    wrong = {
        f"{server.url}/versions/7:predict": (404, good),
        f"{server.url}x:predict": (404, good),
        f"{server.url}:classify": (400, good),
    }
    contents = [
        {"signature_name": "other", "inputs": inputs},
        {"signature_name": 1, "inputs": inputs},
        {**good, "instances": []},
        {"signature_name": "certified", "inputs": {**inputs, "more": [1.0]}},
        {"signature_name": "certified", "inputs": [1.0]},
        {"signature_name": "certified", "inputs": ["text"]},
    ]
    for url, (code, content) in wrong.items():
        found, answer = fetch(url, content)
        assert found == code and answer["error"]
    for content in contents:
        found, answer = fetch(f"{server.url}:predict", content)
        assert found == 400 and answer["error"]
