"""No attack on a random model passes its certificate, and one that passes is reported."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from keras import layers

import keras_lipattn as kl
from tools.soundness import __main__ as program
from tools.soundness.attack import attack
from tools.soundness.generate import Subject, random_subject
from tools.soundness.rules.attack import attack as attack_whole
from tools.soundness.whole import whole_subject


@keras.saving.register_keras_serializable(package="soundness")
class Tripled(layers.Layer):
    def call(self, inputs):
        return 3.0 * inputs


@kl.register_rule(Tripled)
def lie(layer, call):
    return 2.0


def subject_of(layer, index):
    inputs = keras.Input((3, 2), dtype="float64")
    model = keras.Model(inputs, layer(inputs))
    return Subject(model, model, np.random.default_rng(index).normal(size=(2, 3, 2)), None)


def lying_subject(seed, index):
    return subject_of(Tripled(dtype="float64"), index)


@keras.saving.register_keras_serializable(package="soundness")
class Failing(layers.Layer):
    def call(self, inputs):
        return 1.0 * inputs


@kl.register_rule(Failing)
def fail(layer, call):
    raise RuntimeError("a rule that fails")


@keras.saving.register_keras_serializable(package="soundness")
class Mixing(layers.Layer):
    def call(self, inputs):
        return 0.1 * inputs + 0.1 * keras.ops.mean(inputs, axis=0, keepdims=True)


@kl.register_rule(Mixing)
def hide(layer, call):
    return 1.0


def crashing_subject(seed, index):
    return subject_of(Failing(dtype="float64"), index)


def mixing_subject(seed, index):
    return subject_of(Mixing(dtype="float64"), index)


@pytest.mark.parametrize("index", range(6))
def test_no_attack_passes_the_certificate(index):
    for comparison in attack(random_subject(1, index)):
        assert not comparison.is_violation, comparison


@pytest.mark.parametrize("index", range(12))
def test_no_attack_passes_the_certificate_of_a_whole_model(index):
    subject = whole_subject(1, index)
    assert not attack_whole(subject, index).problems, subject.text


def test_whole_models_are_legal_of_every_family_and_mostly_certified():
    subjects = [whole_subject(3, index) for index in range(16)]
    assert {one.case for one in subjects} == {"sequence", "image", "subclassed", "decoder"}
    certified = [kl.certify(one.model, **one.options).is_finite for one in subjects]
    assert sum(certified) >= 6


def test_a_whole_model_is_the_same_for_the_same_seed():
    first, second = whole_subject(2, 5), whole_subject(2, 5)
    assert first.text == second.text
    examples = np.arange(2)
    for one, other in zip(
        first.run(first.points[:2], examples), second.run(second.points[:2], examples), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_crash_of_certify_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(program, "random_subject", crashing_subject)
    with flagsaver.as_parsed(minutes="0", seed="4"):
        assert program.main(["soundness"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: a rule that fails" in printed
    assert "0 violations, 1 crashes" in printed


def test_examples_that_depend_on_each_other_are_found(monkeypatch, capsys):
    monkeypatch.setattr(program, "random_subject", mixing_subject)
    with flagsaver.as_parsed(minutes="0", seed="4"):
        assert program.main(["soundness"]) == 1
    assert "Examples of a batch depend on each other" in capsys.readouterr().out


def test_a_model_is_the_same_for_the_same_seed():
    first, second = random_subject(2, 3), random_subject(2, 3)
    np.testing.assert_array_equal(first.points, second.points)
    for one, other in zip(first.twin.get_weights(), second.twin.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    image = first.twin(first.points).numpy()
    np.testing.assert_array_equal(image, second.twin(second.points).numpy())


def test_a_rule_that_lies_is_found_and_reproduced(monkeypatch, capsys):
    for comparison in attack(lying_subject(0, 0)):
        assert comparison.is_violation
        # The certificate adds a safety for the rounding of norms.
        np.testing.assert_allclose(comparison.ratio, 1.5, rtol=1e-6)
    monkeypatch.setattr(program, "random_subject", lying_subject)
    with flagsaver.as_parsed(minutes="0", seed="4"):
        assert program.main(["soundness"]) == 1
    printed = capsys.readouterr().out
    assert "random_subject(seed=4, index=0)" in printed
    assert "1 models, 6 comparisons, 6 violations" in printed
