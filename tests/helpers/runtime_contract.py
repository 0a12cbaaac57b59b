"""What every runtime that serves an export owes: the same requests and checks for all of them."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import pytest
from helpers import export_cases as cases
from helpers.serving_client import ServingClient, in_float64
from keras import layers
from tensorflow.core.protobuf import saved_model_pb2

import keras_lipattn as lip
from keras_lipattn.certification import Certificate
from keras_lipattn.export import export_saved_model, verification

TOLERANCE = 1e-5
BALL = 6.0
Arrays = Mapping[str, np.ndarray]


def bias_free() -> keras.Model:
    """A model in which every product goes straight into a change of its shape."""
    inputs = keras.Input((None, cases.WIDTH), name="tokens")
    x = lip.SpectralDense(cases.WIDTH, use_bias=False)(inputs)
    x = lip.ScaledCosineAttention(2, 4, use_bias=False)(x)
    x = lip.L2MultiHeadAttention(2, 4, use_bias=False, output_shape=(2, 4))(x)
    x = layers.GlobalMaxPooling2D()(x)
    return cases.randomized(keras.Model(inputs, layers.Dense(3, use_bias=False)(x)))


# Builders and options of the export, by name.
MODELS: dict[str, tuple[Callable[[], keras.Model], dict[str, Any]]] = {
    "softmax over sequences": (cases.classifier, {}),
    "sigmoid over integers": (cases.ids_classifier, {}),
    "logits with a mask": (cases.masked_classifier, {}),
    "tokens in a ball": (cases.classifier, {"norm": "token", "input_radius": BALL}),
    "largest entries": (cases.classifier, {"norm": "linf"}),
    "one vector": (lambda: cases.dense(lambda x: layers.Dense(3)(x)), {}),
    "without biases": (bias_free, {"sequence_length": cases.LENGTH}),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """An exported model, served by TensorFlow without Keras, and in float64."""

    name: str
    path: pathlib.Path
    certificate: Certificate
    record: dict[str, Any]
    exactly: Callable[..., list[np.ndarray]]

    def tensorflow(self, arrays: Arrays, signature: str = "certified") -> dict[str, np.ndarray]:
        """Answer of plain TensorFlow."""
        return _client().serve(self.path, {signature: arrays})[signature]

    def float64(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Answer of the signature `certified` in float64 arithmetic."""
        return dict(zip(sorted(self.outputs), self.exactly(**arrays), strict=True))

    @property
    def outputs(self) -> dict[str, Any]:
        """Shapes and dtypes of the outputs of the signature `certified`."""
        return self.record["signatures"]["certified"]["outputs"]

    @property
    def radius(self) -> str:
        """Name of the output with the radius."""
        return "embedding_radius" if "embedding_radius" in self.outputs else "radius"

    @property
    def slowest(self) -> float:
        """Smallest constant by which a margin is divided."""
        pairs = np.asarray(self.certificate.pairwise_constants)
        return float(pairs[pairs > 0.0].min()) if pairs.size else self.certificate.total

    @property
    def varies(self) -> bool:
        """Whether the length of a request is free."""
        return self.record["sequence_length"] is not None

    def request(self, batch: int = 4, length: int = cases.LENGTH, seed: int = 0) -> dict:
        """Random named inputs."""
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, spec in self.record["signatures"]["certified"]["inputs"].items():
            sizes = [length if size is None else size for size in spec["shape"][1:]]
            if spec["dtype"] == "bool":
                arrays[name] = rng.random((batch, *sizes)) < 0.8
            elif spec["dtype"] == "int32":
                arrays[name] = rng.integers(0, 11, (batch, *sizes)).astype("int32")
            else:
                arrays[name] = rng.normal(size=(batch, *sizes)).astype("float32")
        return arrays

    @property
    def ordinary(self) -> dict[str, dict]:
        """Requests whose answers equal those of TensorFlow, by name."""
        requests = {
            "one example": self.request(1, seed=1),
            "few examples": self.request(5, seed=2),
            "empty batch": self.request(0),
            "batch of 1000": self.request(1000, seed=3),
        }
        if self.varies:
            requests["one token"] = self.request(3, 1)
            requests["short"] = self.request(3, cases.LENGTH - 2)
        return requests

    @property
    def hostile(self) -> dict[str, dict]:
        """Requests of which no example has a radius above 0, by name."""
        requests = {}
        if self.varies:
            requests["too long"] = self.request(3, cases.LENGTH + 3)
        floating = [name for name, x in self.request().items() if x.dtype == np.float32]
        if not floating:
            return requests
        (name,) = floating
        values = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf, "1e38": 1e38, "-3e38": -3e38}
        for text, value in values.items():
            arrays = self.request(4)
            # The last token, so that nothing causal hides it; masks are made to see it.
            for mask in (x for x in arrays.values() if x.dtype == bool):
                mask[:] = True
            for row in range(4):
                arrays[name][row].reshape(-1)[-1 - row] = value
            requests[text] = arrays
        everything = self.request(4)
        everything[name][:] = 1e38
        return {**requests, "all 1e38": everything}


@functools.cache
def _client() -> ServingClient:
    return ServingClient()


@pytest.fixture(scope="module", params=MODELS)
def subject(request, tmp_path_factory) -> Subject:
    """An export of each model."""
    keras.utils.set_random_seed(1)
    build, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp("export")
    original, verification.serve = verification.serve, _client().serve
    try:
        certificate, path = export_saved_model(build(), folder, verbose=False, **options)
    finally:
        verification.serve = original
    record = json.loads((path / "assets.extra" / "export.json").read_text())
    exactly = in_float64(path, "certified")
    return Subject(request.param, path, certificate, record, exactly)


def signature_of(model: pathlib.Path, signature: str) -> Any:
    """A `SignatureDef` of a SavedModel, with the names of its tensors."""
    content = saved_model_pb2.SavedModel()
    content.ParseFromString((model / "saved_model.pb").read_bytes())
    return content.meta_graphs[0].signature_def[signature]


class RuntimeContract:
    """Tests of a runtime. A subclass has `start` and may name what the runtime cannot do."""

    # Names of requests that the runtime refuses by an error.
    refused: tuple[str, ...] = ()

    def start(self, subject: Subject, folder: pathlib.Path) -> Any:
        """A function from named arrays to the named outputs of the signature `certified`."""
        raise NotImplementedError

    def certificate(self, subject: Subject, folder: pathlib.Path) -> Certificate:
        """The certificate that a user of the runtime finds."""
        text = (subject.path / "assets.extra" / "certificate.json").read_text()
        return Certificate.from_json(text)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, subject, tmp_path_factory):
        return tmp_path_factory.mktemp("runtime")

    @pytest.fixture(scope="class")
    @classmethod
    def serve(cls, subject, folder):
        return cls().start(subject, folder)

    def _answer(self, serve, arrays) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in serve(arrays).items()}

    def test_signature_is_found(self, subject, serve):
        arrays = subject.request(2)
        answer = self._answer(serve, arrays)
        assert sorted(answer) == sorted(subject.outputs)
        for name, spec in subject.outputs.items():
            assert answer[name].dtype == spec["dtype"]
            assert answer[name].shape == (2, *spec["shape"][1:])

    def test_certificate_is_found(self, subject, serve, folder):
        assert self.certificate(subject, folder) == subject.certificate

    def test_outputs_equal_those_in_float64(self, subject, serve):
        for name, arrays in subject.ordinary.items():
            if name in self.refused:
                continue
            answer, wanted = self._answer(serve, arrays), subject.float64(arrays)
            close = TOLERANCE * max(1.0, np.abs(wanted["logits"]).max(initial=0.0))
            clear = wanted["margin"] > 2.0 * close
            assert (answer["class"] == wanted["class"])[clear].all(), name
            for output in ("logits", "margin"):
                assert answer[output].shape == wanted[output].shape, name
                gap = np.abs(answer[output] - wanted[output]).max(initial=0.0)
                assert gap <= 2.0 * close if output == "margin" else gap <= close, (name, output)
            # A radius is a margin over a constant, which for two logits is at least this.
            gap = np.abs(answer[subject.radius] - wanted[subject.radius])
            assert (gap <= 4.0 * close / min(1.0, subject.slowest)).all(), name

    def test_radii_are_never_above_those_of_float64(self, subject, serve):
        positive = 0
        for name, arrays in subject.ordinary.items():
            if name in self.refused:
                continue
            answer, exact = self._answer(serve, arrays), subject.float64(arrays)
            radius = answer[subject.radius]
            assert np.isfinite(radius).all() and (radius >= 0.0).all(), name
            allowed = subject.certificate.certified_radius(exact["logits"])
            allowed = np.where(answer["class"] == exact["class"], allowed, 0.0)
            limit = subject.certificate.threat_model.input_radius
            if np.isfinite(limit):
                norms = np.linalg.norm(arrays["tokens"].astype(np.float64), axis=-1)
                allowed = np.minimum(allowed, limit - norms.max(axis=-1)).clip(min=0.0)
            assert (radius <= allowed).all(), name
            positive += (radius > 0.0).sum()
        assert positive > 100

    def test_hostile_inputs_have_radius_zero(self, subject, serve):
        for name, arrays in subject.hostile.items():
            if name in self.refused:
                continue
            answer = self._answer(serve, arrays)
            assert (answer[subject.radius] == 0.0).all(), name
            assert np.isfinite(answer["margin"]).all(), name
