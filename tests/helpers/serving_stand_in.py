"""A stand-in for TensorFlow Serving, which is in no package registry.

It answers the documented REST API (model status, metadata, and predictions in the row and column
format, with `NaN`, `Infinity` and `-Infinity` as tokens) and the `Predict` of gRPC. Both go through
the protocol buffers of the package `tensorflow-serving-api`.
"""

import concurrent.futures
import http.server
import json
import pathlib
import re
import threading
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

_PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+))?(:predict|/metadata)?")


class Refusal(Exception):
    """An error as the server reports it, with the code of HTTP."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class StandIn:
    """Serves the versions of one model until it is closed."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.name = name
        self._versions = {int(path.name): path for path in folder.iterdir() if path.name.isdigit()}
        self._loaded = {v: tf.saved_model.load(str(path)) for v, path in self._versions.items()}
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._http = http.server.ThreadingHTTPServer(("localhost", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        size = [("grpc.max_receive_message_length", -1)]
        self._grpc = grpc.server(concurrent.futures.ThreadPoolExecutor(2), options=size)
        service = prediction_service_pb2_grpc
        service.add_PredictionServiceServicer_to_server(_Servicer(self), self._grpc)
        self.grpc_port = self._grpc.add_insecure_port("localhost:0")
        self._grpc.start()
        self.url = f"http://localhost:{self._http.server_port}/v1/models/{name}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None).wait()

    def version_of(self, name: str, version: int | None) -> int:
        """The version of a request, the highest one by default."""
        if name != self.name or (version is not None and version not in self._versions):
            wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise Refusal(404, f"Servable not found for request: {wanted}")
        return max(self._versions) if version is None else version

    def signatures(self, version: int) -> Any:
        content = saved_model_pb2.SavedModel()
        content.ParseFromString((self._versions[version] / "saved_model.pb").read_bytes())
        return content.meta_graphs[0].signature_def

    def signature(self, version: int, name: str) -> Any:
        found = self.signatures(version)
        if (name or "serving_default") not in found:
            text = f'Serving signature name: "{name}" not found in signature def'
            raise Refusal(400, text)
        return found[name or "serving_default"]

    def predict(self, request: Any) -> Any:
        """A `PredictResponse` for a `PredictRequest`."""
        spec = request.model_spec
        given = spec.version.value if spec.HasField("version") else None
        version = self.version_of(spec.name, given)
        wanted = set(self.signature(version, spec.signature_name).inputs)
        if wanted != set(request.inputs):
            raise Refusal(400, f"inputs {sorted(request.inputs)} do not match {sorted(wanted)}")
        name = spec.signature_name or "serving_default"
        tensors = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        try:
            outputs = self._loaded[version].signatures[name](
                **{name: tf.constant(array) for name, array in tensors.items()}
            )
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise Refusal(400, str(error)) from error
        response = predict_pb2.PredictResponse()
        for key, tensor in outputs.items():
            response.outputs[key].CopyFrom(tf.make_tensor_proto(tensor.numpy()))
        return response

    def status(self, name: str, version: int | None) -> Any:
        self.version_of(name, version)
        response = get_model_status_pb2.GetModelStatusResponse()
        for number in [version] if version is not None else sorted(self._versions):
            entry = response.model_version_status.add(version=number)
            entry.state = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        return response

    def metadata(self, name: str, version: int | None) -> Any:
        version = self.version_of(name, version)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name, response.model_spec.version.value = name, version
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, signature in self.signatures(version).items():
            signatures.signature_def[key].CopyFrom(signature)
        response.metadata["signature_def"].Pack(signatures)
        return response


class _Servicer(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, stand_in: StandIn):
        self._stand_in = stand_in

    def Predict(self, request, context):
        try:
            return self._stand_in.predict(request)
        except Refusal as error:
            codes = {400: grpc.StatusCode.INVALID_ARGUMENT, 404: grpc.StatusCode.NOT_FOUND}
            context.abort(codes[error.code], str(error))


class _Handler(http.server.BaseHTTPRequestHandler):
    stand_in: StandIn

    def do_GET(self):
        def answer(name, version, verb):
            if verb == ":predict":
                raise Refusal(400, f"Malformed request: GET {self.path}")
            message = getattr(self.stand_in, "metadata" if verb else "status")(name, version)
            return json_format.MessageToDict(message, preserving_proto_field_name=True)

        self._reply(answer)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))

        def answer(name, version, verb):
            if verb != ":predict":
                raise Refusal(400, f"Malformed request: POST {self.path}")
            request, is_row_format = self._parse(body, name, version)
            return _as_json(self.stand_in.predict(request), is_row_format)

        self._reply(answer)

    def _reply(self, answer):
        try:
            match = _PATH.fullmatch(self.path)
            if match is None:
                raise Refusal(400, f"Malformed request: {self.command} {self.path}")
            name, version, verb = match.groups()
            code, content = 200, answer(name, None if version is None else int(version), verb)
        except Refusal as error:
            code, content = error.code, {"error": str(error)}
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _parse(self, body, name, version):
        """The `PredictRequest` of a body in JSON, and whether it is in the row format."""
        try:
            content = json.loads(body)
        except ValueError as error:
            raise Refusal(400, f"JSON Parse error: {error}") from error
        signature_name = content.get("signature_name", "")
        if not isinstance(signature_name, str):
            raise Refusal(400, "'signature_name' key must be a string value.")
        if ("instances" in content) == ("inputs" in content):
            raise Refusal(400, "Expected exactly one of 'instances' and 'inputs'.")
        request = predict_pb2.PredictRequest()
        request.model_spec.name = name
        request.model_spec.signature_name = signature_name
        number = self.stand_in.version_of(name, version)
        request.model_spec.version.value = number
        specs = self.stand_in.signature(number, signature_name).inputs
        is_row_format = "instances" in content
        values = content["instances" if is_row_format else "inputs"]
        if is_row_format and len(specs) > 1:
            if not all(isinstance(row, dict) and set(row) == set(specs) for row in values):
                raise Refusal(400, "Failed to process element: not an object of all named inputs.")
            values = {key: [row[key] for row in values] for key in specs}
        elif not isinstance(values, dict):
            values = dict.fromkeys(specs, values)
        for key, value in values.items():
            if key not in specs:
                raise Refusal(400, f"JSON object: does not have named input: {key}")
            request.inputs[key].CopyFrom(_tensor(value, tf.as_dtype(specs[key].dtype)))
        return request, is_row_format

    def log_message(self, *arguments):
        """Keep the log quiet."""


def _tensor(value, dtype):
    """A tensor of nested lists, whose shape is that of the first entries."""
    try:
        array = np.array(value)
    except ValueError as error:
        raise Refusal(400, f"Encountered list at unexpected size: {error}") from error
    kinds = {"bool": "b", "int32": "i", "int64": "i", "float32": "if", "float64": "if"}
    if array.size and array.dtype.kind not in kinds[dtype.name]:
        raise Refusal(400, f"JSON Value: {value} is not of expected type: {dtype.name}")
    return tf.make_tensor_proto(array.astype(dtype.as_numpy_dtype))


def _as_json(response, is_row_format):
    outputs = {key: tf.make_ndarray(proto).tolist() for key, proto in response.outputs.items()}
    rows = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
    if len(outputs) == 1:
        (outputs,) = outputs.values()
        rows = outputs
    return {"predictions": rows} if is_row_format else {"outputs": outputs}
