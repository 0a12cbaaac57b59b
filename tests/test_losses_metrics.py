"""Losses and certified accuracy: their formulas, and what they prove."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lipattn as kl
from keras_lipattn.losses import EfficientMarginCrossentropy, MarginCrossentropy, MulticlassHKR
from keras_lipattn.metrics import CertifiedAccuracy

RNG = np.random.default_rng(7)
CLASSES = 5


def examples(*shape):
    logits = RNG.normal(size=(*shape, CLASSES)).astype("float32")
    # Half of the examples are classified correctly.
    labels = np.where(
        RNG.random(shape) < 0.5, logits.argmax(-1), RNG.integers(0, CLASSES, shape)
    ).astype("int32")
    return labels, logits


def margins(labels, logits):
    """Lead of the correct class over the best other one, in float64."""
    logits = logits.astype(np.float64)
    own = np.eye(CLASSES, dtype=bool)[labels]
    return logits[own].reshape(labels.shape) - np.where(own, -np.inf, logits).max(-1)


def crossentropy(labels, logits):
    rows = np.arange(len(labels))
    return np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels]


@pytest.mark.parametrize("lipschitz", [1.0, 2.5])
@pytest.mark.parametrize("radius", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 30.0])
@pytest.mark.parametrize("annealing", [0.0, 1.0, 5.0])
def test_the_loss_is_its_formula(radius, temperature, lipschitz, annealing):
    labels, logits = examples(6)
    margin = np.sqrt(2.0) * lipschitz * radius
    lowered = logits.astype(np.float64) - margin * np.eye(CLASSES)[labels]
    expected = crossentropy(labels, temperature * lowered)
    expected *= (1.0 - np.exp(-expected)) ** annealing
    loss = MarginCrossentropy(radius, temperature, lipschitz, annealing)
    # float32 logits times 30 under an exponential: a few units of the sixth digit, which the power
    # of `1 - p` multiplies by its exponent.
    tolerance = 1e-5 * (1.0 + annealing)
    found = float(loss(labels, logits))
    assert found == pytest.approx(expected.mean() / temperature, rel=tolerance)


@pytest.mark.parametrize("lipschitz", [1.0, 2.5])
@pytest.mark.parametrize("radius", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 30.0])
def test_the_efficient_loss_is_its_formula(radius, temperature, lipschitz):
    labels, logits = examples(6)
    logits = logits.astype(np.float64)
    lead = logits[np.arange(6), labels][:, None] - logits
    raised = np.clip(lead, 0.0, np.sqrt(2.0) * lipschitz * radius)
    expected = crossentropy(labels, temperature * (logits + raised))
    found = float(EfficientMarginCrossentropy(radius, temperature, lipschitz)(labels, logits))
    # As above.
    assert found == pytest.approx(expected.mean() / temperature, rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
@pytest.mark.parametrize("kind", [MarginCrossentropy, EfficientMarginCrossentropy])
def test_an_ignored_class_counts_neither_in_the_loss_nor_in_its_mean(kind, reduction):
    labels, logits = examples(4, 6)
    ignored = RNG.random((4, 6)) < 0.4
    padded = np.where(ignored, -1, labels)
    loss = kind(0.2, 5.0, ignore_class=-1, reduction=reduction)
    found = np.array(loss(padded, logits))
    if reduction is None:
        assert (found[ignored] == 0.0).all()
        found = found[~ignored]
    expected = kind(0.2, 5.0, reduction=reduction)(labels[~ignored], logits[~ignored])
    # Sums of float32 in another order.
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)
    with tf.GradientTape() as tape:
        tensor = tf.constant(logits)
        tape.watch(tensor)
        total = tf.reduce_sum(loss(padded, tensor))
    gradient = np.array(tape.gradient(total, tensor))
    assert (gradient[ignored] == 0.0).all() and (gradient[~ignored] != 0.0).any()
    assert kind.from_config(loss.get_config()).get_config() == loss.get_config()


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_both_margin_losses_agree_once_every_margin_is_large(temperature):
    labels, logits = examples(20)
    logits += 10.0 * np.eye(CLASSES, dtype="float32")[labels]
    asked = MarginCrossentropy(0.5, temperature)(labels, logits)
    raised = EfficientMarginCrossentropy(0.5, temperature)(labels, logits)
    # Float32: one lowers a logit, the other raises all others.
    assert float(raised) == pytest.approx(float(asked), rel=1e-4)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 0], [0, 0, 3, 3, 3, 1], [2] * 6])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("radius", [0.0, 0.7])
def test_the_hinge_loss_is_its_formula(radius, alpha, labels):
    _, logits = examples(6)
    half = 0.5 * np.sqrt(2.0) * 1.5 * radius
    kr, hinge = [], []
    for k in range(CLASSES):
        own = np.array(labels) == k
        if own.any() and not own.all():
            kr.append(logits[own, k].mean(dtype=float) - logits[~own, k].mean(dtype=float))
    for y, z in zip(labels, logits.astype(float), strict=True):
        others = np.maximum(half + np.delete(z, y), 0.0)
        hinge.append(max(half - z[y], 0.0) + others.mean())
    expected = alpha * np.mean(hinge) - (1.0 - alpha) * np.sum(kr) / CLASSES
    found = float(MulticlassHKR(radius, alpha, lipschitz=1.5)(np.array(labels), logits))
    # Sums of float32 numbers of size 1 that cancel.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_example_without_hinge_is_certified():
    labels, logits = examples(1000)
    loss = MulticlassHKR(0.2, alpha=1.0, lipschitz=0.5, reduction=None)
    small = np.array(loss(labels, logits)) == 0.0
    assert small.any()
    assert float(CertifiedAccuracy(0.2, 0.5)(labels[small], logits[small])) == 1.0


@pytest.mark.parametrize("kind", [MarginCrossentropy, EfficientMarginCrossentropy])
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("lipschitz", [0.5, 2.0])
def test_an_example_with_a_small_loss_is_certified(kind, radius, lipschitz):
    labels, logits = examples(1000)
    temperature = 10.0
    loss = kind(radius, temperature, lipschitz, reduction=None)
    # Below log(2) the softmax of the correct class is above 1/2, so it is still the largest.
    small = np.array(loss(labels, logits)) < 0.999 * np.log(2.0) / temperature
    assert small.any()
    metric = CertifiedAccuracy(radius, lipschitz)
    assert float(metric(labels[small], logits[small])) == 1.0


@pytest.mark.parametrize(
    "loss",
    [
        MarginCrossentropy(0.3, 1e3, annealing=0.5),
        EfficientMarginCrossentropy(0.3, 1e3),
        MulticlassHKR(0.3, 0.9),
    ],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_gradients_are_finite_at_ties_and_at_huge_logits(loss, scale):
    labels, logits = examples(8)
    variable = tf.Variable(scale * logits)
    with tf.GradientTape() as tape:
        value = loss(labels, variable)
    gradient = tf.convert_to_tensor(tape.gradient(value, variable))
    assert np.isfinite(gradient).all() and np.isfinite(value)


@pytest.mark.parametrize("shape", [(8,), (3, 4)])
@pytest.mark.parametrize("as_column", [False, True])
def test_labels_may_be_a_column_and_logits_have_more_axes(shape, as_column):
    labels, logits = examples(*shape)
    loss, metric = MarginCrossentropy(0.1, 3.0), CertifiedAccuracy(0.1)
    expected = float(loss(labels.ravel(), logits.reshape(-1, CLASSES)))
    given = labels[..., None] if as_column else labels
    # Float32 means, summed in another order.
    assert float(loss(given, logits)) == pytest.approx(expected, rel=1e-6)
    share = np.mean(margins(labels, logits) > np.sqrt(2.0) * 0.1)
    assert float(metric(given, logits)) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("lipschitz", [0.3, 1.0, np.inf])
@pytest.mark.parametrize("radius", [0.0, 0.2, 1.0])
def test_certified_accuracy_is_its_definition(radius, lipschitz):
    labels, logits = examples(500)
    weights = RNG.random(500).astype("float32")
    counted = margins(labels, logits) > (np.sqrt(2.0) * lipschitz * radius if radius else 0.0)
    metric = CertifiedAccuracy(radius, lipschitz)
    for part in np.split(np.arange(500), [100, 350]):
        metric.update_state(labels[part], logits[part], sample_weight=weights[part])
    # A float32 mean over hundreds of weights.
    expected = np.average(counted, weights=weights.astype(np.float64))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


def test_certified_accuracy_falls_with_the_radius_and_the_constant():
    labels, logits = examples(500)
    constants = [float(CertifiedAccuracy(0.2, size)(labels, logits)) for size in (0.1, 1.0, 5.0)]
    radii = [float(CertifiedAccuracy(size)(labels, logits)) for size in (0.0, 0.1, 0.3, 1.0)]
    for found in (constants, radii):
        assert found == sorted(found, reverse=True) and found[0] > found[-1]
    # A float32 mean.
    assert radii[0] == pytest.approx(np.mean(logits.argmax(-1) == labels), rel=1e-6)


@pytest.mark.parametrize("radius", [0.1, 2.0])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_margin_is_the_smallest_that_proves_the_class(radius, scale):
    # Logits that are the input times `scale`: the constant is attained.
    change = radius * np.array([-1.0, 1.0]) / np.sqrt(2.0)
    for slack, certified in ((1.001, True), (0.999, False)):
        x = np.array([[np.sqrt(2.0) * radius * slack, 0.0]])
        assert bool(CertifiedAccuracy(radius, scale)([0], scale * x)) is certified
        moved = scale * (x + change)
        assert (moved[0, 0] > moved[0, 1]) == certified


@pytest.mark.parametrize("position", range(CLASSES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_never_certified(bad, position):
    logits = np.zeros((CLASSES, CLASSES), "float32")
    logits[:, position] = bad
    logits += 3.0 * np.eye(CLASSES, dtype="float32")
    for radius in (0.0, 0.1):
        assert float(CertifiedAccuracy(radius)(np.arange(CLASSES), logits)) == 0.0


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_that_are_no_class_are_never_certified(label):
    logits = -np.ones((1, CLASSES), "float32")
    assert float(CertifiedAccuracy(0.0)([label], logits)) == 0.0


def test_one_unit_is_refused():
    """It has no second logit: every example of class 0 would count, for any radius."""
    with pytest.raises(ValueError, match=r"two or more classes.*certified_radius"):
        CertifiedAccuracy(1e6)([0, 1], np.ones((2, 1), "float32"))


def test_ties_count_as_errors():
    assert float(CertifiedAccuracy(0.0)([0, 1], np.ones((2, CLASSES)))) == 0.0


@pytest.mark.parametrize("jit_compile", [False, True])
def test_both_work_in_fit_and_evaluate_and_survive_saving(jit_compile, tmp_path):
    x = RNG.normal(size=(40, 6)).astype("float32")
    labels = RNG.integers(0, CLASSES, 40)
    weights = RNG.random(40).astype("float32")
    model = keras.Sequential([keras.Input((6,)), kl.SpectralDense(CLASSES)])
    model.compile(
        "adam",
        MarginCrossentropy(0.05, 5.0, 0.7),
        metrics=[CertifiedAccuracy(0.0, name="plain"), CertifiedAccuracy(0.05, 0.7)],
        weighted_metrics=[CertifiedAccuracy(0.05, 0.7, name="weighted")],
        jit_compile=jit_compile,
    )
    history = model.fit(x, labels, sample_weight=weights, epochs=2, batch_size=16, verbose=0)
    assert history.history["certified_accuracy"][-1] <= history.history["plain"][-1]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    counted = margins(labels, model.predict(x, verbose=0)) > np.sqrt(2.0) * 0.7 * 0.05
    for one in (model, again):
        found = one.evaluate(x, labels, sample_weight=weights, verbose=0, return_dict=True)
        assert found["certified_accuracy"] == pytest.approx(counted.mean(), rel=1e-6)
        # A float32 mean over 40 weights.
        expected = np.average(counted, weights=weights)
        assert found["weighted"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "made",
    [
        MarginCrossentropy(0.3, 30.0, 1.5, 2.0, reduction="sum", name="mine"),
        EfficientMarginCrossentropy(0.3, 30.0, 1.5, reduction="sum", name="mine"),
        MulticlassHKR(0.3, 0.9, 1.5, reduction="sum", name="mine"),
        CertifiedAccuracy(0.3, 1.5, name="mine", dtype="float64"),
        CertifiedAccuracy(0.3, np.inf),
    ],
)
def test_the_configuration_is_json_and_gives_an_equal_one(made):
    config = json.loads(json.dumps(made.get_config()))
    again = type(made).from_config(config)
    assert again.get_config() == made.get_config()
    labels, logits = examples(20)
    assert float(again(labels, logits)) == float(made(labels, logits))


@pytest.mark.parametrize(
    "made", [MarginCrossentropy, EfficientMarginCrossentropy, MulticlassHKR, CertifiedAccuracy]
)
@pytest.mark.parametrize(
    "arguments",
    [
        {"radius": -0.1},
        {"radius": float("nan")},
        {"radius": float("inf")},
        {"radius": None},
        {"radius": 0.1, "lipschitz": 0.0},
        {"radius": 0.1, "lipschitz": float("nan")},
    ],
)
def test_arguments_out_of_range_are_refused(made, arguments):
    name = list(arguments)[-1]
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        made(**arguments)


LOSSES = [MarginCrossentropy, EfficientMarginCrossentropy, MulticlassHKR]


class SoftmaxOfCode(keras.layers.Layer):
    def call(self, x):
        return keras.ops.softmax(x)


class LogitsBesideProbabilities(keras.layers.Layer):
    def call(self, x):
        return x + 0.0 * keras.ops.sum(keras.activations.softmax(x))


def dense(**options):
    return keras.layers.Dense(CLASSES, **options)


PROBABILITIES = {
    "dense": lambda: [dense(activation="softmax")],
    "own dense": lambda: [kl.SpectralDense(CLASSES, activation="softmax")],
    "activation": lambda: [dense(), keras.layers.Activation("softmax")],
    "layer": lambda: [dense(), keras.layers.Softmax()],
    "operation": lambda: [dense(), SoftmaxOfCode()],
    "dropout": lambda: [dense(activation="softmax"), keras.layers.Identity()],
    "half": lambda: [dense(activation="softmax", dtype="mixed_float16")],
    "nested": lambda: [keras.Sequential([dense(activation="softmax")])],
}
LOGITS = {
    "dense": lambda: [dense()],
    "own dense": lambda: [kl.OrthogonalDense(CLASSES)],
    "hidden softmax": lambda: [dense(activation="softmax"), dense()],
    "hidden sigmoid": lambda: [dense(activation="sigmoid"), dense()],
    "scaled": lambda: [dense(activation="softmax"), keras.layers.Rescaling(10.0)],
    "linear": lambda: [dense(activation="linear"), keras.layers.Activation("linear")],
    "log_softmax": lambda: [dense(activation="log_softmax")],
    "with probabilities": lambda: [dense(), LogitsBesideProbabilities()],
}


def run_everywhere(layers, loss, *, eager):
    """Calls of the loss: alone, and in `fit` and `evaluate`, in a graph or eagerly."""
    model = keras.Sequential([keras.Input((4,)), *layers])
    labels, _ = examples(6)
    x = RNG.normal(size=(6, 4)).astype("float32")
    yield lambda: loss(labels, model(x, training=False))
    model.compile("sgd", loss, run_eagerly=eager, jit_compile=False)
    yield lambda: model.fit(x, labels, epochs=1, verbose=0)
    yield lambda: model.evaluate(x, labels, verbose=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("end", PROBABILITIES)
def test_probabilities_are_refused(end, eager):
    made = LOSSES[list(PROBABILITIES).index(end) % 3]
    for run in run_everywhere(PROBABILITIES[end](), made(0.1), eager=eager):
        with pytest.raises(ValueError, match=f"{made.__name__}.* takes logits"):
            run()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("end", LOGITS)
def test_logits_are_never_refused(end, eager):
    made = LOSSES[list(LOGITS).index(end) % 3]
    for run in run_everywhere(LOGITS[end](), made(0.1), eager=eager):
        run()
