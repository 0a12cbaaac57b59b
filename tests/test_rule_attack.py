"""Every rule of `certify` has a case, and no attack on a case refutes its certificate."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_lipattn as kl
from keras_lipattn.certification.registry import LAYER_RULES, OPERATION_RULES
from keras_lipattn.certification.tracing import EXPANSIONS
from tools.soundness.rules.attack import attack, range_fault
from tools.soundness.rules.cases import all_cases, schedule
from tools.soundness.rules.interpolation import interpolation_in_float64
from tools.soundness.rules.run import attack_rules
from tools.soundness.rules.subjects import (
    POINTS,
    Illegal,
    RuleSubject,
    Source,
    plain_model,
    rule_subject,
)

CASES = all_cases()
_PACKAGES = ("keras", "keras_lipattn")


def legal_outcome(seed, position):
    """The first legal subject of the case at this position, with its index and its outcome."""
    for index in range(position, 20 * len(schedule()), len(schedule())):
        try:
            subject = rule_subject(seed, index)
            return index, subject, attack(subject, index)
        except Illegal:
            continue
    raise AssertionError(f"no legal subject of {CASES[position].name}")


def subject_of(layer, shape=(3, 2)):
    inputs = keras.Input(shape, dtype="float64", name="x")
    return RuleSubject(
        text=type(layer).__name__,
        case="test",
        model=keras.Model(inputs, layer(inputs)),
        options={},
        sources=(Source("x", shape),),
        points=np.random.default_rng(0).normal(size=(POINTS, math.prod(shape))),
        fixed={},
        masked=False,
        tolerance=1e-6,
        shortens=False,
    )


@keras.saving.register_keras_serializable(package="rule_attack")
class Tripled(layers.Layer):
    def call(self, inputs):
        return 3.0 * inputs


@keras.saving.register_keras_serializable(package="rule_attack")
class WithoutMean(layers.Layer):
    def call(self, inputs):
        return 0.5 * inputs - 0.1 * ops.mean(inputs, axis=0)


@kl.register_rule(Tripled, WithoutMean)
def lie(layer, call):
    return 2.0


def test_every_layer_with_a_rule_has_a_case():
    # Other tests may register rules for layers of their own.
    rules = {**LAYER_RULES, **EXPANSIONS}
    classes = {cls for cls in rules if cls.__module__.split(".")[0] in _PACKAGES}
    missing = classes - {case.target for case in CASES}
    assert not missing


def test_every_operation_with_a_rule_has_a_case():
    missing = set(OPERATION_RULES) - {case.target for case in CASES}
    assert not missing


@pytest.mark.parametrize("position", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i].name}")
def test_a_case_calls_its_target(position):
    case = CASES[position]
    kinds = {type(operation) for operation in plain_model(case).operations}
    if case.is_layer:
        assert any(issubclass(kind, case.target) for kind in kinds)
    else:
        assert case.target in {kind.__name__ for kind in kinds}


@pytest.mark.parametrize("position", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i].name}")
def test_no_attack_refutes_a_certificate(position):
    index, subject, outcome = legal_outcome(0, position)
    assert not outcome.problems, f"seed 0, index {index}: {subject.text}"


def test_a_subject_is_the_same_for_the_same_seed():
    first, second = rule_subject(3, 5), rule_subject(3, 5)
    assert first.text == second.text
    np.testing.assert_array_equal(first.points, second.points)
    for one, other in zip(first.model.weights, second.model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_constant_that_is_too_small_is_found():
    problems = attack(subject_of(Tripled(dtype="float64"))).problems
    assert any("found 3 > certified 2" in problem for problem in problems)


@pytest.mark.parametrize("size", [(4, 4), (6, 5)])
def test_pixels_rounded_to_float32_do_not_disturb_an_attack(size):
    # Far from 0, where a rounding is 1e-5 of a step.
    far = keras.Sequential(
        [
            layers.Rescaling(1.0, 100.0, dtype="float64"),
            layers.Resizing(*size, dtype="float64"),
        ]
    )
    outcome = attack(subject_of(far, (4, 4, 1)))
    assert not outcome.problems
    # Copied pixels have the constant 1, and others a margin of 1e-5 for their weights.
    worst = max(one.ratio for one in outcome.comparisons if one.norm == "linf")
    assert 1.0 - 2e-5 <= worst <= 1.0 + 1e-9


OPTIONS = [
    {"method": "bilinear"},
    {"method": "bilinear", "antialias": True},
    {"method": "bicubic"},
    {"method": "bicubic", "antialias": True},
    {"method": "area"},
    {"method": "lanczos5", "antialias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: "-".join(map(str, one.values())))
@pytest.mark.parametrize("size", [(3, 9), (7, 5), (12, 4)])
def test_interpolation_in_float64_is_that_of_tensorflow_without_rounding(options, size):
    images = np.random.default_rng(0).normal(size=(2, 7, 5, 3))
    rounded = np.asarray(tf.image.resize(images, size, **options), np.float64)
    with interpolation_in_float64():
        exact = np.asarray(tf.image.resize(images, size, **options))
        doubled = np.asarray(tf.image.resize(2.0 * images + 1.0, size, **options))
        ones = np.asarray(tf.image.resize(np.ones_like(images), size, **options))
    # A pixel is a sum of at most 7 terms along one axis, each a sum of at most 5 along the other,
    # and each pixel is rounded, and its two weights. Absolute weights sum to less than 3.
    rounding = 2.0**-24 * 3.0 * (7 + 5 + 3)
    assert np.abs(exact - rounded).max() <= rounding * np.abs(images).max()
    np.testing.assert_allclose(doubled, 2.0 * exact + ones, rtol=0.0, atol=1e-14)
    # Weights keep their rounding to float32, with which they sum to 1.
    np.testing.assert_allclose(ones, 1.0, rtol=0.0, atol=rounding)


def test_examples_that_depend_on_each_other_are_found():
    problems = attack(subject_of(WithoutMean(dtype="float64"))).problems
    assert problems == ["one example changes the output of another, with a certificate"]


def test_a_token_outside_of_a_claimed_range_is_found():
    values = np.array([[3.0, 4.0], [0.0, 1.0]])
    assert not range_fault(values, 0.0, 5.0, 4.0)
    assert "from the center" in range_fault(values, 0.0, 4.9, 4.0)
    assert "an entry" in range_fault(values, 0.0, 5.0, 3.9)
    assert "from the center" in range_fault(values, np.array([3.0, 4.0]), 4.0, 4.0)


def test_a_run_counts_what_it_compared(capsys):
    attack_rules(seed=0, comparisons=1)
    printed = capsys.readouterr().out
    assert "subjects" in printed and "comparisons" in printed and "worst ratio" in printed
