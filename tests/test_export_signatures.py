"""Answers of an exported model: the outputs of Keras, and radii that hold."""

import json
import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import export_cases as cases
from helpers.serving_client import in_float64
from keras import layers

from keras_lipattn.certification import Certificate
from keras_lipattn.export import ExportError, export_saved_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def client():
    with cases.one_serving_process() as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


class Export:
    """A model, its certificate and the path of its export."""

    def __init__(self, model, folder, **options):
        self.model = model
        self.certificate, self.path = export_saved_model(model, folder, verbose=False, **options)
        extra = self.path / "assets.extra"
        self.record = json.loads((extra / "export.json").read_text())
        self.file = (extra / "certificate.json").read_text()


@pytest.fixture(scope="module")
def sequences(client, folder):
    return Export(cases.classifier(), folder / "sequences")


@pytest.fixture(scope="module")
def identifiers(client, folder):
    return Export(cases.ids_classifier(), folder / "identifiers")


@pytest.fixture(scope="module")
def masked(client, folder):
    return Export(cases.masked_classifier(), folder / "masked")


def close(got, wanted):
    return np.abs(got - wanted).max() <= TOLERANCE * max(1.0, np.abs(wanted).max())


def predicted(model, inputs) -> np.ndarray:
    for layer in model._flatten_layers():
        if hasattr(layer, "condense"):
            layer.condense()
    return np.asarray(model(inputs, training=False))


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 3), (5, cases.LENGTH)])
def test_any_batch_and_length_equals_keras(client, sequences, batch, length):
    x = cases.tokens(batch, length, seed=batch)
    answer = client.serve(sequences.path, {"serving_default": {"tokens": x}})
    assert close(answer["serving_default"]["output_0"], predicted(sequences.model, x))


def test_dict_inputs_and_masks_equal_keras(client, masked):
    x = cases.tokens(3)
    valid = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]], bool)
    request = {"tokens": x, "valid": valid}
    answer = client.serve(masked.path, {"serving_default": request})["serving_default"]
    assert close(answer["output_0"], predicted(masked.model, request))


def test_certified_signature_agrees_with_the_default_one(client, sequences):
    x = cases.tokens(7)
    request = {"tokens": x}
    answers = client.serve(sequences.path, {"serving_default": request, "certified": request})
    certified, probabilities = answers["certified"], answers["serving_default"]["output_0"]
    ranked = np.sort(certified["logits"], axis=-1)
    softmax = np.exp(certified["logits"] - ranked[:, -1:])
    softmax /= softmax.sum(axis=-1, keepdims=True)
    assert close(softmax, probabilities)
    assert (certified["class"] == probabilities.argmax(axis=-1)).all()
    np.testing.assert_allclose(certified["margin"], ranked[:, -1] - ranked[:, -2], rtol=1e-6)


@pytest.mark.parametrize("ending", cases.ENDINGS)
def test_every_ending_stands_for_the_same_logits(client, folder, ending):
    keras.utils.set_random_seed(1)
    export = Export(cases.dense(cases.ENDINGS[ending]), folder / ending.replace(" ", "_"))
    x = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    answer = client.serve(export.path, {"certified": {"x": x}})["certified"]
    plain = cases.dense(cases.ENDINGS["linear"])
    plain.set_weights([w for w in export.model.get_weights() if w.ndim][: len(plain.weights)])
    logits = predicted(plain, x)
    assert close(answer["logits"], logits)
    assert (answer["class"] == logits.argmax(axis=-1)).all()
    assert (answer["radius"] <= export.certificate.certified_radius(answer["logits"])).all()
    assert (answer["radius"] > 0.0).all()


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_one_unit_decides_by_its_sign(client, folder, activation):
    model = cases.dense(layers.Dense(1, activation=activation))
    export = Export(model, folder / f"unit_{activation}")
    x = np.random.default_rng(3).normal(size=(9, 4)).astype(np.float32)
    answer = client.serve(export.path, {"certified": {"x": x}})["certified"]
    output = predicted(model, x)[:, 0]
    threshold = 0.5 if activation else 0.0
    assert (answer["class"] == (output > threshold)).all()
    np.testing.assert_array_equal(answer["margin"], np.abs(answer["logits"][:, 0]))
    assert (answer["radius"] <= answer["margin"] / export.certificate.total).all()
    assert (answer["radius"] > 0.9 * answer["margin"] / export.certificate.total - 1e-4).all()


def test_subclassed_model_is_served_for_the_shapes_of_its_example(client, folder):
    model = cases.subclassed()
    export = Export(
        model, folder / "subclassed", example_batch=cases.tokens(), sequence_length=cases.LENGTH
    )
    # Its code was traced at one length, so nothing is certified at another length.
    for length, certified in ((4, False), (cases.LENGTH, True)):
        x = cases.tokens(2, length)
        request = {"inputs": x}
        answers = client.serve(export.path, {"serving_default": request, "certified": request})
        assert close(answers["serving_default"]["output_0"], predicted(model, x))
        assert ((answers["certified"]["radius"] > 0.0) == certified).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_other_precisions_are_served(client, folder, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = cases.dense(layers.Dense(3, activation="softmax"))
    finally:
        keras.config.set_dtype_policy("float32")
    export = Export(model, folder / policy)
    x = np.random.default_rng(3).normal(size=(9, 4)).astype(np.float32)
    answer = client.serve(export.path, {"certified": {"x": x}})["certified"]
    allowed = export.certificate.certified_radius(answer["logits"])
    assert (answer["radius"] <= allowed).all()
    if policy == "float64":
        assert export.record["rounding"]["kappa"] < 1e-12
        assert (answer["radius"] > 0.99 * allowed).all()
    else:
        # In half precision the rounding error is a large part of the margins.
        assert export.record["rounding"]["kappa"] > 1e-3
        assert export.record["comparison"]["tolerance"] > TOLERANCE


# Radii ------------------------------------------------------------------------------------------


def test_radius_is_the_certificates_less_the_allowance(client, sequences):
    x = cases.tokens(32)
    answer = client.serve(sequences.path, {"certified": {"tokens": x}})["certified"]
    kappa = sequences.record["rounding"]["kappa"]
    sizes = np.linalg.norm(x.reshape(32, -1), axis=-1)
    largest = np.maximum(1.0, np.abs(answer["logits"]).max(axis=-1))
    allowance = 2.0 * kappa * (sequences.certificate.total * sizes + largest)
    for row in range(32):
        logits = answer["logits"][row]
        wanted = sequences.certificate.certified_radius(logits, allowance=allowance[row])
        # Four roundings in float32, and one factor 1 - 1e-6.
        assert answer["radius"][row] <= wanted * (1.0 + 1e-6)
        assert answer["radius"][row] >= wanted * (1.0 - 3e-6) - 1e-7
        assert answer["radius"][row] <= sequences.certificate.certified_radius(logits)


def test_no_attack_within_the_radius_changes_the_class(client, sequences):
    x = cases.tokens(16)
    answer = client.serve(sequences.path, {"certified": {"tokens": x}})["certified"]
    radius = answer["radius"][:, None, None]
    assert (radius > 0.0).all()
    moved = tf.Variable(x + 1e-3 * cases.tokens(16, seed=5) * radius)
    for _ in range(12):
        with tf.GradientTape() as tape:
            probabilities = sequences.model(moved)
            own = tf.gather(probabilities, answer["class"], axis=1, batch_dims=1)
            loss = tf.reduce_sum(tf.math.log(own))
        slope: Any = tape.gradient(loss, moved)
        size = tf.norm(tf.reshape(slope, (16, -1)), axis=-1)[:, None, None]
        step = moved - 0.3 * radius * slope / tf.maximum(size, 1e-30) - x
        length = tf.norm(tf.reshape(step, (16, -1)), axis=-1)[:, None, None]
        moved.assign(x + step * tf.minimum(1.0, 0.999 * radius / tf.maximum(length, 1e-30)))
    classes = predicted(sequences.model, moved.numpy()).argmax(axis=-1)
    assert (classes == answer["class"]).all()


def test_longer_inputs_than_certified_have_radius_zero(client, sequences):
    for length, valid in [(cases.LENGTH, True), (cases.LENGTH + 1, False)]:
        request = {"tokens": cases.tokens(4, length)}
        answer = client.serve(sequences.path, {"certified": request})["certified"]
        assert ((answer["radius"] > 0.0) == valid).all()


def test_ties_and_what_is_not_finite_have_radius_zero(client, sequences, folder):
    x = cases.tokens(4)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = np.nan, np.inf, 1e30
    answer = client.serve(sequences.path, {"certified": {"tokens": x}})["certified"]
    assert (answer["radius"][:3] == 0.0).all() and answer["radius"][3] > 0.0
    assert np.isfinite(answer["margin"]).all()
    tied = cases.dense(layers.Dense(3))
    tied.layers[-1].kernel.assign(np.ones((5, 3)))
    tied.layers[-1].bias.assign(np.array([1.0, 1.0, 0.0]))
    export = Export(tied, folder / "tied")
    answer = client.serve(export.path, {"certified": {"x": np.ones((2, 4), np.float32)}})
    assert (answer["certified"]["radius"] == 0.0).all()


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_radius_stays_within_the_ball_of_the_inputs(client, folder, norm):
    limit = 4.0
    inputs = keras.Input((cases.LENGTH, cases.WIDTH), name="x")
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(inputs)))
    export = Export(model, folder / f"ball_{norm}", norm=norm, input_radius=limit)
    x = cases.tokens(32) * np.linspace(0.01, 3.0, 32, dtype=np.float32)[:, None, None]
    answer = client.serve(export.path, {"certified": {"x": x}})["certified"]
    largest = np.linalg.norm(x, axis=-1).max(axis=-1)
    room = np.maximum(limit - largest, 0.0) / (math.sqrt(cases.WIDTH) if norm == "linf" else 1.0)
    assert (answer["radius"] <= room).all()
    assert (answer["radius"][largest > limit] == 0.0).all()
    assert (answer["radius"][largest < 0.5 * limit] > 0.0).any()


def test_integers_are_certified_in_units_of_their_embeddings(client, identifiers):
    ids = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9]], np.int32)
    answer = client.serve(identifiers.path, {"certified": {"ids": ids}})["certified"]
    assert sorted(answer) == ["class", "embedding_radius", "logits", "margin"]
    assert (answer["embedding_radius"] > 0.0).all()
    assert "embeddings" in identifiers.record["certified_signature"]["radius"]
    wanted = predicted(identifiers.model, ids)[:, 0] > 0.5
    assert (answer["class"] == wanted).all()


def test_images_of_integers_are_served_with_radii_in_their_units(client, folder):
    inputs = keras.Input((4, 4, 1), dtype="uint8", name="image")
    x = layers.Flatten()(layers.Rescaling(1.0 / 255.0)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(x))
    export = Export(model, folder / "images")
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1)).astype("uint8")
    answer = client.serve(export.path, {"certified": {"image": images}})["certified"]
    allowed = export.certificate.certified_radius(model.predict(images, verbose=0))
    assert (answer["radius"] <= allowed * (1.0 + 1e-5)).all() and (answer["radius"] > 0.0).any()


@pytest.fixture(scope="module")
def exactly(sequences):
    return in_float64(sequences.path, "certified")


@pytest.mark.parametrize("scale, offset", [(1e-3, 0.0), (1.0, 0.0), (1.0, 100.0), (1e4, 0.0)])
def test_rounding_stays_below_the_allowance(client, sequences, exactly, scale, offset):
    x = (scale * cases.tokens(64) + offset).astype(np.float32)
    served = client.serve(sequences.path, {"certified": {"tokens": x}})["certified"]
    exact = dict(zip(sorted(served), exactly(tokens=x), strict=True))
    error = np.abs(served["logits"] - exact["logits"]).max(axis=-1)
    sizes = np.linalg.norm(x.reshape(64, -1), axis=-1)
    largest = np.maximum(1.0, np.abs(exact["logits"]).max(axis=-1))
    kappa = sequences.record["rounding"]["kappa"]
    assert (error <= kappa * (sequences.certificate.total * sizes + largest)).all()


def test_no_radius_where_rounding_decides(client, sequences):
    # Between two inputs of different classes, as close to the border as float32 allows.
    x = 3.0 * cases.tokens(64)

    def answer(x):
        return client.serve(sequences.path, {"certified": {"tokens": x}})["certified"]

    classes = answer(x)["class"]
    there = x[classes != classes[0]]
    assert len(there)
    near, far = np.repeat(x[:1], len(there), axis=0), there
    for _ in range(40):
        middle = 0.5 * (near + far)
        same = (answer(middle)["class"] == classes[0])[:, None, None]
        near, far = np.where(same, middle, near), np.where(same, far, middle)
    for side, other in ((near, far), (far, near)):
        radius = answer(side)["radius"]
        assert (radius <= np.linalg.norm((side - other).reshape(len(side), -1), axis=-1)).all()
        assert (radius == 0.0).all()


def test_a_grid_of_unknown_size_has_no_radius(client, folder):
    inputs = keras.Input((None, None, cases.WIDTH), name="grid")
    x = layers.GlobalAveragePooling2D()(cases.attention(lipschitz_bound=None)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(x))
    batch = np.ones((1, 2, 3, cases.WIDTH), np.float32)
    export = Export(model, folder / "grid", example_batch=batch)
    assert "let one axis vary" in export.record["certified_signature"]["missing"]
    assert export.certificate.threat_model.max_tokens == cases.LENGTH


# Files -----------------------------------------------------------------------------------------


def test_certificate_in_the_files_is_the_one_returned(sequences):
    certificate = Certificate.from_json(sequences.file)
    assert certificate == sequences.certificate
    assert certificate.matches(sequences.model)
    assert sequences.record["constant"] == certificate.total
    assert sequences.record["sequence_length"] == cases.LENGTH


def test_certificate_speaks_of_the_constants_that_are_served(sequences):
    # The caps are active: the certificate of each layer is its cap.
    constants = {row.layer: row.constant for row in sequences.certificate.rows}
    assert 0.999 <= constants["L2MultiHeadAttention"] <= 1.0 + 1e-6
    assert 0.999 <= constants["SpectralDense"] <= 1.0 + 1e-6


def test_outputs_that_are_no_classes_are_served_without_radius(client, folder):
    export = Export(cases.tagger(), folder / "tagger")
    assert list(export.record["signatures"]) == ["serving_default"]
    assert "one vector" in export.record["certified_signature"]["missing"]
    x = cases.tokens(2, 3)
    answer = client.serve(export.path, {"serving_default": {"inputs": x}})["serving_default"]
    assert sorted(answer) == ["mean", "tags"]
    labels = cases.dense(layers.Dense(3, activation="sigmoid"))
    export = Export(labels, folder / "labels")
    assert "several sigmoid units" in export.record["certified_signature"]["missing"]


def test_export_leaves_the_model_as_it_was(folder, client):
    model = cases.dense(layers.Dense(3, activation="softmax"))
    x = np.ones((2, 4), np.float32)
    before, weights = predicted(model, x), model.get_weights()
    Export(model, folder / "unchanged")
    np.testing.assert_array_equal(predicted(model, x), before)
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert model.layers[-1].activation is keras.activations.softmax


# Refusals ---------------------------------------------------------------------------------------


def test_what_cannot_be_certified_is_refused_or_said(folder, client):
    model = cases.dense(lambda x: layers.Dense(3)(layers.Lambda(keras.ops.square)(x)))
    with pytest.raises(ExportError, match="lambda"):
        Export(model, folder / "refused")
    assert not (folder / "refused").exists()
    export = Export(model, folder / "uncertified", allow_uncertified=True)
    assert not export.record["certified"] and "lambda" in export.record["reason"]
    assert list(export.record["signatures"]) == ["serving_default"]
    certificate = Certificate.from_json(export.file)
    assert certificate.total == math.inf and certificate.reasons


def test_weights_that_are_not_numbers_are_refused(folder, client):
    model = cases.classifier()
    attention = next(layer for layer in model.layers if hasattr(layer, "query_kernel"))
    attention.query_kernel.assign(np.full(attention.query_kernel.shape, np.nan))
    with pytest.raises(ExportError, match="cannot be certified"):
        Export(model, folder / "nan")
    assert not (folder / "nan").exists()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: cases.subclassed(by_operation=True), "keras.ops"),
        (lambda: cases.dense(_twice), "called more than once"),
    ],
)
def test_logits_out_of_reach_are_refused(folder, client, build, message):
    model = build()
    shape = (2, cases.LENGTH, cases.WIDTH) if isinstance(model, cases.Subclassed) else (2, 4)
    options = {"example_batch": np.ones(shape, np.float32)}
    with pytest.raises(ExportError, match=message):
        Export(model, folder / "hidden", **options)
    assert not (folder / "hidden").exists()
    name = message.replace(" ", "_")
    export = Export(model, folder / name, allow_uncertified=True, **options)
    assert list(export.record["signatures"]) == ["serving_default"]


def _twice(x):
    layer = layers.Dense(5, activation="softmax")
    return layer(layer(x))


def test_masks_from_the_input_need_the_assumption(folder, client):
    inputs = keras.Input((None, cases.WIDTH), name="tokens")
    x = layers.GlobalAveragePooling1D()(cases.attention()(layers.Masking()(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(x))
    with pytest.raises(ExportError, match="mask"):
        Export(model, folder / "jumps")
    export = Export(model, folder / "assumed", assume_fixed_mask=True)
    assert export.record["assumed_fixed_masks"]
