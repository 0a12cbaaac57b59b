"""No attack on a random model passes its certificate, and one that passes is reported."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from keras import layers

from keras_lipattn import register_rule
from tools.soundness import __main__ as program
from tools.soundness.attack import attack
from tools.soundness.generate import Subject, random_subject


@keras.saving.register_keras_serializable(package="soundness")
class Tripled(layers.Layer):
    def call(self, inputs):
        return 3.0 * inputs


@register_rule(Tripled)
def lie(layer, call):
    return 2.0


def lying_subject(seed, index):
    inputs = keras.Input((3, 2), dtype="float64")
    model = keras.Model(inputs, Tripled(dtype="float64")(inputs))
    return Subject(model, model, np.random.default_rng(index).normal(size=(2, 3, 2)), None)


@pytest.mark.parametrize("index", range(6))
def test_no_attack_passes_the_certificate(index):
    for comparison in attack(random_subject(1, index)):
        assert not comparison.is_violation, comparison


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
