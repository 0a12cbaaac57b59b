"""Models with logits of every token: a radius for each token, which no attack contradicts."""

from typing import Any

import keras
import numpy as np
import pytest
from helpers.certify_cases import jacobians, randomize
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.export import verify_export

CLASSES = 3


def _dense(x, **options):
    return layers.Dense(CLASSES, **options)(x)


def _attention(x):
    return kl.Residual(0.5)([x, kl.L2MultiHeadAttention(2, 2)(x, use_causal_mask=True)])


# Shapes of inputs, and what follows.
LOGITS: dict[str, tuple[tuple[int | None, ...], Any]] = {
    "tagger": ((4, 5), lambda x: _dense(layers.Dense(6, activation="tanh")(x))),
    "language model": ((4, 5), lambda x: _dense(_attention(x))),
    "open length": ((None, 5), lambda x: _dense(_attention(x))),
    "scaled": ((4, 5), lambda x: layers.Rescaling(3.0)(_dense(x))),
    "segmentation": ((4, 4, 2), lambda x: layers.Conv2D(CLASSES, 3, padding="same")(x)),
    "softmax of tokens": ((4, 5), lambda x: layers.Softmax(axis=1)(_dense(x))),
    "operations": ((4, 5), lambda x: ops.tanh(ops.matmul(x, np.eye(5, CLASSES, dtype="float32")))),
}
PROBABILITIES = {
    "dense": lambda x: _dense(x, activation="softmax"),
    "log": lambda x: _dense(x, activation="log_softmax"),
    "activation": lambda x: layers.Activation("softmax")(_dense(x)),
    "layer": lambda x: layers.Softmax()(_dense(x)),
    "layer with an axis": lambda x: layers.Softmax(axis=2)(_dense(x)),
    "operation": lambda x: ops.softmax(_dense(x)),
    "operation with an axis": lambda x: ops.softmax(_dense(x), axis=2),
}


def _model(shape, build):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, build(inputs))
    randomize(model)
    return model


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
@pytest.mark.parametrize("name", LOGITS)
def test_no_attack_within_the_radius_changes_the_class_of_a_token(name, norm):
    shape, build = LOGITS[name]
    model = _model(shape, build)
    length: dict[str, Any] = {"sequence_length": 4} if None in shape else {}
    certificate = kl.certify(model, norm, **length)
    assert certificate.head == "token logits" and certificate.pairwise_constants == ()
    assert kl.certification.Certificate.from_json(certificate.to_json()) == certificate
    rng = np.random.default_rng(0)
    sizes = tuple(size or 4 for size in shape)
    x = rng.normal(size=(2, *sizes)).astype("float32")
    logits = model.predict(x, verbose=0)
    radii = certificate.certified_radius(logits)
    assert radii.shape == logits.shape[:-1] and (radii > 0.0).all()
    ahead = np.sort(logits.astype(np.float64), axis=-1)
    factor = 2.0 if norm == "linf" else np.sqrt(2.0)
    expected = (ahead[..., -1] - ahead[..., -2]) / (factor * certificate.total)
    np.testing.assert_allclose(radii, expected, rtol=1e-6)
    # Along the gradient of each margin of each token, and at random.
    matrices = jacobians(lambda z: model(z, training=False), x)
    axes: Any = {"l2": tuple(range(2, 2 + len(sizes))), "token": (-1,), "linf": ()}[norm]
    for point, answers, around, matrix in zip(x, logits, radii, matrices, strict=True):
        rows = matrix.reshape(-1, CLASSES, point.size)
        labels = answers.reshape(-1, CLASSES).argmax(-1)
        own = np.take_along_axis(rows, labels[:, None, None], axis=1)
        steps = np.concatenate([rows - own, rng.normal(size=(len(rows), 5, point.size))], axis=1)
        steps = steps.reshape(*steps.shape[:2], *sizes)
        if norm == "linf":
            steps = np.sign(steps)
        lengths = np.sqrt(np.square(steps).sum(axis=axes, keepdims=True)) if axes else 1.0
        reach = 0.999 * around.reshape(-1, *[1] * (1 + len(sizes)))
        moved = point + reach * steps / np.maximum(lengths, 1e-30)
        found = model.predict_on_batch(moved.reshape(-1, *sizes).astype("float32"))
        found = found.reshape(len(rows), -1, len(rows), CLASSES).argmax(-1)
        for place, label in enumerate(labels):
            assert (found[place, :, place] == label).all()


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_of_tokens_are_not_taken_as_logits(name):
    model = _model((4, 5), PROBABILITIES[name])
    certificate = kl.certify(model)
    assert certificate.head == ""
    with pytest.raises(ValueError, match="without a softmax"):
        certificate.certified_radius(np.zeros((1, 4, CLASSES)))


def test_certified_accuracy_counts_tokens():
    model = _model(*LOGITS["language model"])
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 4, 5)).astype("float32")
    logits = model.predict(x, verbose=0)
    y = np.where(rng.random((6, 4)) < 0.5, logits.argmax(-1), 0)
    found = kl.certified_accuracy(model, x, y, [0.01, 0.1], "token")
    radii = kl.certify(model, "token").certified_radius(logits)
    right = logits.argmax(-1) == y
    np.testing.assert_array_equal(found.correct, right.ravel())
    np.testing.assert_array_equal(found.certified_radii, np.where(right, radii, 0.0).ravel())
    refused: list[dict[str, Any]] = [{"local": True}, {"attack": True}]
    for options in refused:
        with pytest.raises(ValueError, match="must be left out"):
            kl.certified_accuracy(model, x, y, [0.1], **options)
    with pytest.raises(ValueError, match="examples or tokens"):
        kl.certified_accuracy(model, x, y[:, 0], [0.1])
    with pytest.raises(ValueError, match="logits of every token"):
        kl.certified_radius(model, x)


def test_a_local_certificate_gives_radii_up_to_its_own():
    model = _model((4, 5), lambda x: _dense(_attention(layers.LayerNormalization()(x))))
    x = np.random.default_rng(2).normal(size=(4, 5))
    logits = model.predict(x[None], verbose=0)
    local = kl.certify(model, center=x, radius=1e-3)
    globally = kl.certify(model)
    assert local.head == globally.head == "token logits"
    radii = local.certified_radius(logits)
    assert radii.shape == (1, 4) and (radii <= 1e-3).all()
    assert (radii >= np.minimum(globally.certified_radius(logits), 1e-3)).all()


def test_an_export_is_verified_and_has_no_signature_with_radii(tmp_path):
    model = _model(*LOGITS["language model"])
    certificate, path = kl.export_saved_model(model, tmp_path / "served")
    verification = verify_export(path)
    assert certificate.head == "token logits" and bool(verification), verification.reason
