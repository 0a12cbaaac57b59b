"""The certificate as a value: margins, words, JSON, fingerprint, pictures, the command line."""

import builtins
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from helpers.certify_cases import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import keras_lipattn as kl
from keras_lipattn.bounds.activated_product import (
    activated_gap_constants,
    activated_product_constant,
)
from keras_lipattn.certification import Certificate, CertificateRow, certify
from keras_lipattn.certification.classifier_head import MOST_PAIRED_CLASSES
from keras_lipattn.certification.reasons import REPLACEMENTS

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "certify.py"


def classifier(classes=4, activation=None, scale=None, seed=1):
    x = keras.Input((6,))
    features = layers.Dense(5, activation="tanh")(x)
    logits = layers.Dense(classes, activation=activation if scale is None else None)(features)
    if scale is not None:
        logits = layers.Activation(activation)(layers.Rescaling(scale)(logits))
    model = keras.Model(x, logits, name="classifier")
    randomize(model, seed)
    return model


def after_tanh(model, matrix):
    """Constant of the first layer of `classifier`, its tanh, and this matrix."""
    first = model.layers[1].get_weights()[0].astype(np.float64)
    return activated_product_constant(first, matrix.astype(np.float64), (0.0, 1.0), "l2")


def norms_of(model):
    first, last = (layer.get_weights()[0] for layer in model.layers if layer.get_weights())
    return np.linalg.norm(first, 2), last


@pytest.mark.parametrize("activation", [None, "softmax", "log_softmax"])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_margins_use_the_columns_of_the_last_kernel(activation, scale):
    model = classifier(activation=activation, scale=scale and 3.0)
    certificate = certify(model)
    features, kernel = norms_of(model)
    kernel = kernel * (scale or 1.0)
    assert certificate.total == pytest.approx(after_tanh(model, kernel), rel=1e-5)
    logits = np.array([3.0, 1.0, -2.0, 0.5])
    first = model.layers[1].get_weights()[0].astype(np.float64)
    joint = activated_gap_constants(first, kernel.astype(np.float64), (0.0, 1.0), "l2")
    # The smallest of three bounds for a pair: by the difference of its columns, alone and together
    # with the layers before it, and by the total.
    pairs = [
        min(
            features * np.linalg.norm(kernel[:, 0] - kernel[:, j]),
            joint[0, j],
            math.sqrt(2.0) * certificate.total,
        )
        for j in range(4)
    ]
    expected = [math.inf, *((3.0 - logits[j]) / pairs[j] for j in (1, 2, 3))]
    np.testing.assert_allclose(certificate.pairwise_radius(logits), expected, rtol=1e-5)
    assert certificate.certified_radius(logits) == pytest.approx(min(expected), rel=1e-5)
    # Never worse than by the constant of the logits; constants of pairs are rounded up once more.
    by_total = 2.0 / (math.sqrt(2.0) * certificate.total)
    assert certificate.certified_radius(logits) >= by_total * (1.0 - 1e-8)
    assert certificate.head == ("logits" if activation is None else "softmax")
    assert ("pre-softmax" in str(certificate)) == (activation is not None)


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_no_attack_within_the_radius_changes_the_class(norm):
    model = classifier(activation="softmax")
    certificate = certify(model, norm=norm)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype("float32")
    logits = (
        keras.Model(model.input, model.layers[-1].input)(x).numpy()
        @ (model.layers[-1].get_weights()[0])
        + model.layers[-1].get_weights()[1]
    )
    radii = certificate.certified_radius(logits)
    assert (radii > 0.0).all()
    for _ in range(50):
        step = rng.normal(size=x.shape)
        size = np.abs(step).max(1) if norm == "linf" else np.linalg.norm(step, axis=1)
        moved = x + (0.999 * radii / size)[:, None] * step
        assert (model(moved.astype("float32")).numpy().argmax(-1) == logits.argmax(-1)).all()


def test_one_sigmoid_unit():
    model = classifier(1, "sigmoid")
    certificate = certify(model)
    features, kernel = norms_of(model)
    assert certificate.head == "sigmoid"
    assert "sigmoid" in certificate.threat_model.output
    assert certificate.total == pytest.approx(after_tanh(model, kernel), rel=1e-5)
    radii = certificate.certified_radius(np.array([[2.0], [-1.0], [0.0], [np.nan]]))
    np.testing.assert_allclose(radii, np.array([2.0, 1.0, 0.0, 0.0]) / certificate.total, rtol=1e-6)
    assert certificate.certified_radius(2.0) == pytest.approx(2.0 / certificate.total)
    # Several sigmoid units are several answers, not one class.
    many = certify(classifier(3, "sigmoid"))
    assert many.total < 0.3 * features * 10.0 and many.head == "logits"


def test_ties_and_broken_logits_certify_nothing():
    certificate = certify(classifier())
    logits = np.array([[1.0, 1.0, 0.0, 0.0], [np.nan, 1.0, 0.0, 0.0], [np.inf, 1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(certificate.certified_radius(logits), 0.0)
    near = np.array([1.0, 1.0 - 1e-3, 0.0, 0.0])
    assert certificate.certified_radius(near) > 0.0
    assert certificate.certified_radius(near, allowance=1e-2) == 0.0


def test_a_negative_allowance_is_refused():
    """It would make margins, and radii, larger."""
    model = classifier()
    certificate = certify(model)
    unit = certify(keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")]))
    for ask in (
        lambda: certificate.certified_radius(np.eye(4), allowance=-1.0),
        lambda: certificate.pairwise_radius(np.eye(4), allowance=-1.0),
        lambda: unit.certified_radius([[0.0]], allowance=-1.0),
        lambda: kl.certified_radius(model, np.zeros(model.input_shape[1:]), allowance=-1.0),
    ):
        with pytest.raises(ValueError, match=r"`allowance` must.*Received"):
            ask()


def test_equal_columns_never_meet():
    model = classifier(2)
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([np.stack([kernel[:, 0]] * 2, axis=1), bias])
    certificate = certify(model)
    assert certificate.certified_radius([1.0, 0.0]) == math.inf
    assert certificate.certified_radius([1.0, 1.0]) == 0.0


def test_nothing_is_certified_without_a_constant():
    x = keras.Input((5, 4))
    model = keras.Model(x, layers.Dense(3)(layers.LSTM(4)(x)))
    certificate = certify(model)
    np.testing.assert_array_equal(certificate.certified_radius(np.eye(3)), 0.0)


def test_many_classes_fall_back_to_the_constant_of_the_logits():
    model = classifier(MOST_PAIRED_CLASSES + 1)
    certificate = certify(model)
    assert certificate.pairwise_constants == ()
    logits = np.zeros(MOST_PAIRED_CLASSES + 1)
    logits[3] = 1.0
    assert certificate.certified_radius(logits) == pytest.approx(
        1.0 / math.sqrt(2.0) / certificate.total
    )


def test_logits_must_fit():
    certificate = certify(classifier(4))
    for logits in (np.zeros(3), np.zeros((2, 5)), 1.0):
        with pytest.raises(ValueError, match="Received"):
            certificate.certified_radius(logits)
    x = keras.Input((5, 4))
    for output in (layers.Dense(3, activation="softmax")(x), layers.Dense(1)(x)):
        sequence = certify(keras.Model(x, output))
        for logits in (np.zeros(3), np.zeros((2, 5, 3))):
            with pytest.raises(ValueError, match="Received"):
                sequence.certified_radius(logits)
    tokens = certify(keras.Model(x, layers.Dense(3)(x)))
    for logits in (np.zeros((2, 5, 1)), 1.0):
        with pytest.raises(ValueError, match="Received"):
            tokens.certified_radius(logits)


def demo():
    x = keras.Input((8, 6), name="tokens")
    y = kl.L2MultiHeadAttention(2, 3, name="attention")(x)
    y = kl.Residual(0.5)([x, y])
    y = layers.LayerNormalization()(y)
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(y)), name="demo")


def test_the_published_total_is_of_the_same_graph():
    model = demo()
    certificate = certify(model)
    row = certificate.row("attention")
    bound = model.layers[1].lipschitz()
    assert (row.constant, row.published) == (bound.value, bound.published)
    ratio = (0.5 + 0.5 * row.published) / (0.5 + 0.5 * row.constant)
    assert certificate.published_total == pytest.approx(ratio * certificate.total, rel=1e-6)


def test_vacuous_is_said_in_words():
    modest = certify(classifier())
    assert modest.vacuous == ""
    x = keras.Input((6,))
    loud = certify(keras.Model(x, layers.Rescaling(2000.0)(x)))
    assert "vacuous" in loud.vacuous and "10^3.3" in loud.vacuous
    assert "vacuous" in str(loud)


def test_totals_beyond_floats_keep_their_logarithm():
    x = y = keras.Input((6,))
    for _ in range(30):
        y = layers.Activation("relu")(layers.Rescaling(1e30)(y))
    certificate = certify(keras.Model(x, y))
    assert certificate.total == math.inf
    assert certificate.log10 == pytest.approx(900.0)
    assert "too large" in certificate.reasons[0]
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_a_constant_function_has_constant_zero():
    x = keras.Input((6,))
    model = keras.Model(x, layers.Dense(2, kernel_initializer="zeros", bias_initializer="ones")(x))
    certificate = certify(model)
    assert certificate.total == 0.0
    assert certificate.log10 == -math.inf
    assert Certificate.from_json(certificate.to_json()) == certificate


@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_json_is_legal_and_goes_both_ways(norm):
    for model in (demo(), classifier(activation="softmax")):
        certificate = certify(model, norm=norm)
        text = certificate.to_json()
        # `parse_constant` is called for NaN and Infinity, which JSON does not have.
        content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        assert content["schema"] == 2
        assert Certificate.from_json(text) == certificate


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 99}', "3"])
def test_other_texts_are_no_certificates(text):
    with pytest.raises(ValueError, match="Received"):
        Certificate.from_json(text)


def _changed(change):
    content = json.loads(certify(_IDENTITY).to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("rows"),
        lambda c: c.pop("model"),
        lambda c: c.pop("threat_model"),
        lambda c: c["threat_model"].pop("norm"),
        lambda c: c["rows"][0].pop("path"),
        lambda c: c.update(rows=None),
        lambda c: c.update(rows=[3]),
        lambda c: c.update(threat_model=[]),
        lambda c: c.update(pairwise_constants=[3]),
        lambda c: c.update(pairwise_constants=[["a"]]),
        lambda c: c.update(total="large"),
        lambda c: c.update(total=None),
        lambda c: c.update(total=10**400),
        lambda c: c.update(total=math.nan),
        lambda c: c.update(other=1),
        lambda c: c["threat_model"].update(norm="l7"),
        lambda c: c["threat_model"].update(lost=[["a"]]),
        lambda c: c["rows"][0].update(tokens="many"),
        lambda c: c["rows"][0].update(exact=1),
    ],
)
def test_a_broken_certificate_is_a_value_error(change):
    with pytest.raises(ValueError, match="Received"):
        Certificate.from_json(_changed(change))


@pytest.mark.parametrize("text", ["", "{", '{"schema": 2}', "[" * 100_000, "null", '{"schema": 2'])
def test_a_broken_text_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"Received|Expecting|deeply"):
        Certificate.from_json(text)


def test_what_is_no_text_is_a_value_error():
    for text in (None, 3, [], b"\xff", '{"schema": true}', '{"schema": 2, "schema": 2}'):
        with pytest.raises(ValueError, match=r"Received|decode"):
            Certificate.from_json(text)  # type: ignore[arg-type]


def _paths_of(content, path=()):
    """Keys of everything in a nested structure."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list) else items
    for key, item in items:
        yield from _paths_of(item, (*path, key))


_STRANGE = [None, True, -1, 0, 3, 10**400, -0.5, 1e999, "", "inf", "-inf", "nan", "x", [], [[]], {}]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_edited_certificate_is_a_value_error_or_equal(data):
    text = data.draw(st.sampled_from(_texts()))
    content = json.loads(text)
    path = data.draw(st.sampled_from(sorted(_paths_of(content), key=str)))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(st.sampled_from(_STRANGE))
    else:
        del inner[path[-1]]
    try:
        read = Certificate.from_json(json.dumps(content))
    except ValueError:
        return
    # Derived entries are not read, and 0 and 0.0 are one number.
    assert read == Certificate.from_json(text)


@functools.cache
def _texts():
    local = certify(classifier(), center=np.ones(6), radius=0.1)
    return [
        certify(classifier(activation="softmax")).to_json(),
        certify(demo(), norm="token").to_json(),
        local.to_json(),
    ]


_PAIRS = ((0.0, 1.0), (1.0, 0.0))


@pytest.mark.parametrize(
    "changes",
    [
        lambda c: {"total": c.total / 100.0},
        lambda c: {"total": c.total / 100.0, "log10": c.log10 - 2.0},
        lambda c: {"total": math.nan},
        lambda c: {"total": -1.0},
        lambda c: {"total": "0.1"},
        lambda c: {"total": None},
        lambda c: {"log10": math.nan},
        lambda c: {"pairwise_constants": tuple((0.0,) * 4 for _ in range(4))},
        lambda c: {"pairwise_constants": ()},
        lambda c: {"pairwise_constants": _PAIRS},
        lambda c: {"pairwise_constants": "pairs"},
        lambda c: {"head": "sigmoid"},
        lambda c: {"rows": ()},
        lambda c: {"rows": None},
        lambda c: {"threat_model": dataclasses.replace(c.threat_model, input_radius=9.0)},
        lambda c: {"threat_model": dataclasses.replace(c.threat_model, max_tokens=9)},
        lambda c: {"threat_model": None},
        lambda c: {"content_hash": 64 * "0"},
        # Even with a new hash, values outside of their ranges match nothing.
        lambda c: {"total": math.nan, "content_hash": ""},
        lambda c: {"total": c.total / 100.0, "content_hash": ""},
        lambda c: {"total": "0.1", "content_hash": ""},
    ],
)
def test_a_changed_certificate_matches_nothing(changes):
    model = classifier()
    certificate = certify(model)
    assert certificate.matches(model)
    changed = dataclasses.replace(certificate, **changes(certificate))
    assert not changed.matches(model)


@pytest.mark.parametrize("changes", [{"total": 0.1, "log10": -1.0}, {"head": "softmax"}])
def test_an_edited_text_does_not_have_its_own_hash(changes):
    content = json.loads(certify(classifier()).to_json())
    content.update(changes, pairwise_constants=[])
    with pytest.raises(ValueError, match=r"content_hash.*Received"):
        Certificate.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"total": 1.01 * c.total}, "logarithm"),
        (lambda c: {"total": -1.0}, "total"),
        (lambda c: {"published_log10": 3.0}, "published_total"),
        (lambda c: {"head": "lstm"}, "head"),
        (lambda c: {"pairwise_constants": ((0.0, 1.0),)}, "square"),
        (lambda c: {"pairwise_constants": ((0.0, 1.0), (2.0, 0.0))}, "symmetric"),
        (lambda c: {"pairwise_constants": ((0.1, 1.0), (1.0, 0.0))}, "diagonal"),
        (lambda c: {"pairwise_constants": ((0.0, 1e9), (1e9, 0.0))}, "at most"),
        (lambda c: {"pairwise_constants": _PAIRS, "head": "logit"}, "pairwise"),
        (lambda c: {"fingerprint": "0"}, "fingerprint"),
        (lambda c: {"rows": (*c.rows, c.rows[0])}, "differ"),
        (lambda c: {"rows": (dataclasses.replace(c.rows[0], constant=-1.0),)}, "constant of row"),
        (lambda c: {"rows": (dataclasses.replace(c.rows[0], tokens=-1),)}, "tokens of row"),
        (
            lambda c: {"threat_model": dataclasses.replace(c.threat_model, input_radius=-1.0)},
            "input_radius",
        ),
        (lambda c: {"threat_model": dataclasses.replace(c.threat_model, radius=1.0)}, "center"),
        (lambda c: {"threat_model": dataclasses.replace(c.threat_model, mask="some")}, "mask"),
    ],
)
def test_values_out_of_range_are_refused_whatever_the_hash(change, message):
    certificate = certify(classifier())
    changed = dataclasses.replace(certificate, **change(certificate), content_hash="")
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        Certificate.from_json(changed.to_json())


@pytest.mark.parametrize("model", [lambda: demo(), lambda: classifier(activation="softmax")])
@pytest.mark.parametrize("norm", ["l2", "token", "linf"])
def test_every_certificate_is_in_its_own_ranges(model, norm):
    model = model()
    assert certify(model, norm=norm).matches(model)
    local = certify(model, norm=norm, center=np.ones(model.input_shape[1:]), radius=0.1)
    assert local.matches(model)
    assert Certificate.from_json(local.to_json()) == local


_numbers = st.floats(0.0, allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(_numbers, _numbers, st.floats(allow_nan=False), st.text(max_size=8))
def test_any_row_survives_json(constant, radius, cost, text):
    certificate = certify(_IDENTITY)
    row = CertificateRow(
        path=text, layer="L", constant=constant, published=constant, radius=radius, cost=cost
    )
    changed = dataclasses.replace(certificate, rows=(row,), content_hash="")
    assert Certificate.from_json(changed.to_json()) == changed


_IDENTITY = keras.Sequential([keras.Input((2,)), layers.Identity()])


def test_a_certificate_is_frozen():
    certificate = certify(_IDENTITY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(certificate, "total", 0.0)  # noqa: B010
    with pytest.raises(KeyError, match="Received"):
        certificate.row("nothing")


def test_the_fingerprint_is_of_every_bit_of_the_weights(tmp_path):
    model = demo()
    certificate = certify(model)
    assert certificate.matches(model)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert certificate.matches(loaded)
    weight = model.layers[-1].kernel
    value = weight.numpy()
    before = value[0, 0]
    value[0, 0] = np.nextafter(before, np.float32(2.0))
    weight.assign(value)
    assert not certificate.matches(model)
    value[0, 0] = before
    weight.assign(value)
    assert certificate.matches(model)
    # Counters of the monitor have no part in the function.
    model.layers[1].penalty_coefficient.assign(0.5)
    assert certificate.matches(model)
    assert not certificate.matches(classifier())


def test_the_fingerprint_notices_another_activation():
    inputs = keras.Input((4,))
    layer = layers.Dense(4, activation="tanh", name="hidden")
    model = keras.Model(inputs, layers.Dense(3)(layer(inputs)))
    certificate = certify(model)
    assert certificate.matches(keras.models.clone_model(model)) is False
    layer.activation = keras.activations.softplus
    assert not certificate.matches(model)
    x, y = np.zeros((2, 4)), np.zeros(2, int)
    with pytest.raises(ValueError, match=r"`certificate` must be for these weights"):
        kl.certified_accuracy(model, x, y, [0.1], certificate=certificate)
    layer.activation = keras.activations.tanh
    assert certificate.matches(model)


def pre_norm_block(x, mask=None):
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 8)(y, y, attention_mask=mask)])
    y = layers.Dense(16, activation="relu")(layers.LayerNormalization()(x))
    return layers.Add()([x, layers.Dense(8)(y)])


def test_a_vacuous_certificate_says_what_to_change():
    x = y = keras.Input((6, 8))
    for _ in range(3):
        y = pre_norm_block(y)
    model = keras.Model(x, y)
    randomize(model, 0)
    certificate = certify(model)
    assert certificate.is_finite and certificate.vacuous
    costs: dict[str, float] = {}
    for row in certificate.rows:
        costs[row.layer] = costs.get(row.layer, 0.0) + row.cost
    first, second, third = sorted(costs, key=lambda layer: -costs[layer])[:3]
    assert {first, second} <= {"LayerNormalization", "MultiHeadAttention", "Dense"}
    assert len(certificate.proposals) == 3
    for layer, line in zip((first, second, third), certificate.proposals, strict=True):
        assert f" {layer}, factor " in line and ": use " in line
        assert line in str(certificate)
    (norms,) = (line for line in certificate.proposals if "LayerNormalization" in line)
    assert norms.startswith("6 LayerNormalization") and norms.endswith("use CenterNormalization")
    stored = json.loads(certificate.to_json())
    assert stored["proposals"] == list(certificate.proposals)
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_a_certificate_of_use_proposes_nothing():
    assert certify(classifier()).proposals == ()
    assert "what to change" not in str(certify(classifier()))


def test_large_factors_are_named_in_a_certificate_that_is_not_vacuous_too():
    x = y = keras.Input((6, 8))
    for _ in range(3):
        y = layers.Add()([y, kl.MaxMin()(kl.OrthogonalDense(8)(y))])
    certificate = certify(keras.Model(x, y))
    assert certificate.total == pytest.approx(8.0, rel=1e-5) and not certificate.vacuous
    assert certificate.proposals == ("3 Add (x + f(x)), factor 8: use Residual",)


def _pooled(x, mask, divisor):
    weights = keras.ops.cast(mask, x.dtype)[..., None]
    total = keras.ops.sum(x * weights, axis=1)
    if divisor is None:
        return total
    if isinstance(divisor, str):
        return total / keras.ops.maximum(keras.ops.sum(weights, axis=1), float(divisor))
    return total / divisor


@pytest.mark.parametrize(
    "divisor, factor",
    [("40", None), ("96", None), (96.0, None), ("1", 9.8), (1.0, 9.8), (None, 9.8)],
)
def test_a_sum_that_is_divided_by_a_large_count_is_a_mean(divisor, factor):
    x, mask = keras.Input((96, 6)), keras.Input((96,), dtype="bool")
    hidden = kl.OrthogonalDense(16)(x)
    logits = kl.OrthogonalDense(4)(_pooled(hidden, mask, divisor))
    certificate = certify(keras.Model([x, mask], logits))
    assert next(row for row in certificate.rows if row.layer == "Sum").cost > 2.0
    named = [line for line in certificate.proposals if "Sum" in line]
    assert bool(named) == (factor is not None)
    assert all(f"factor {factor}" in line for line in named)


def test_a_division_elsewhere_does_not_hide_the_cost_of_a_sum():
    x = keras.Input((96, 6))
    y = kl.OrthogonalDense(16)(x / 255.0)
    (line,) = certify(keras.Model(x, keras.ops.sum(y, axis=1))).proposals
    assert line.startswith("1 Sum, factor 9.8")


def test_every_proposal_names_what_keras_or_this_package_has():
    for replacement in set(REPLACEMENTS.values()):
        names = set(re.findall(r"\b[A-Z]\w+", replacement)) - {"True"}
        assert names
        for name in names:
            assert hasattr(kl, name) or hasattr(layers, name), name


def test_places_of_one_cause_share_a_line():
    x = y = keras.Input((6, 8))
    for _ in range(4):
        y = layers.MultiHeadAttention(2, 4)(y, y)
    y = layers.LSTM(3)(y)
    certificate = certify(keras.Model(x, y))
    attention, recurrent = certificate.reasons
    assert "4 places" in attention and "tokens are unbounded" in attention
    assert "places" not in recurrent and "LSTM" in recurrent
    for line in certificate.reasons:
        assert line.count("; ") <= 1 and "\n" not in line and "register_rule" not in line
    assert [line.split(",")[0] for line in certificate.proposals] == [
        "4 MultiHeadAttention",
        "1 LSTM",
    ]


def test_an_unknown_length_asks_for_the_length_alone():
    x = keras.Input((None, 8))
    y = pre_norm_block(x)
    (reason,) = certify(keras.Model(x, y)).reasons
    assert "pass `sequence_length`" in reason and "use " not in reason
    assert certify(keras.Model(x, y)).proposals == ()


def test_a_computed_mask_is_one_cause_at_the_layer_that_takes_it():
    x = keras.Input((6, 8))
    mask = keras.ops.expand_dims(keras.ops.any(keras.ops.not_equal(x, 0.0), -1), 1)
    model = keras.Model(x, pre_norm_block(x, mask))
    certificate = certify(model)
    (reason,) = certificate.reasons
    assert "(MultiHeadAttention): its mask is computed" in reason
    assert "pass `use_causal_mask=True`" in reason and "pass `assume_fixed_mask=True`" in reason
    for row in certificate.rows:
        assert row.is_finite or row.explained_by or row.layer == "MultiHeadAttention"
    assert certify(model, assume_fixed_mask=True).is_finite


def test_layers_after_masking_add_no_causes():
    x = keras.Input((6, 8))
    (reason,) = certify(keras.Model(x, pre_norm_block(layers.Masking()(x)))).reasons
    assert "(Masking): it computes a mask" in reason and reason.count("; ") == 1


def test_code_that_cannot_be_traced_has_a_reason_without_the_words_of_keras():
    class Branching(keras.Model):
        def call(self, x):
            return x if keras.ops.max(x) > 0.0 else 2.0 * x

    model = Branching(name="branching")
    model(np.ones((1, 3), np.float32))
    (reason,) = certify(model).reasons
    assert reason.startswith("`branching` (Branching): it cannot be traced")
    assert "\n" not in reason and "Exception" not in reason
    assert reason.count("; ") == 1 and "keras.ops" in reason


def test_the_table_explains_its_columns():
    text = str(certify(demo()))
    header, *_, footer = text.split("columns:")
    titles = header.splitlines()[0]
    assert "share" not in titles and "token radius" in titles
    for title in ("constant", "published", "token radius", "factor", "because"):
        assert title in titles and f"  {title}: " in footer


def test_the_table_reads_well():
    text = str(certify(demo()))
    for piece in (
        "attention",
        "Theorem 3.B",
        "published",
        "tokens",
        "2-norm",
        "fixed mask",
    ):
        assert piece in text
    assert max(map(len, text.splitlines())) < 180


def test_plot(tmp_path):
    certify(demo()).plot(tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 5000


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install"):
        certify(_IDENTITY).plot(tmp_path / "costs.png")


def run_tool(*arguments, cwd=TOOL.parents[1]):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
    )


def test_the_command_line_is_a_gate(tmp_path):
    path = tmp_path / "model.keras"
    model = classifier(activation="softmax")
    model.save(path)
    total = certify(model).total
    output = tmp_path / "certificate.json"
    passed = run_tool(path, f"--max={total * 1.01}", f"--json={output}")
    assert passed.returncode == 0, passed.stderr
    assert "Lipschitz constant of 'classifier'" in passed.stdout
    assert Certificate.from_json(output.read_text()).matches(model)
    failed = run_tool(path, f"--max={total * 0.99}", "--norm=l2")
    assert failed.returncode == 1
    assert "above --max" in failed.stderr


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["model.keras", "--norm=l7"]])
def test_wrong_usage_has_an_exit_code_of_its_own(arguments):
    assert run_tool(*arguments).returncode == 2


@pytest.mark.parametrize("flag", ["max", "input_radius"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_limit_that_is_not_a_finite_number_is_wrong_usage(flag, value):
    run = run_tool("model.keras", f"--{flag}={value}")
    assert run.returncode == 2
    assert f"--{flag}" in run.stderr and "Traceback" not in run.stderr
