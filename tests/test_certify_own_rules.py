"""A custom layer with its own rule is certified like any other; a rule that lies is refuted."""

import math
from typing import Any

import keras
import numpy as np
import pytest
from helpers.certify_cases import jacobian_norm, jacobians
from keras import layers, ops

import keras_lipattn.certification as certification
from keras_lipattn.certification import (
    Affine,
    Certificate,
    CertificateRefuted,
    Combination,
    Elementwise,
    LayerCall,
    LipschitzMap,
    Reason,
    TokenMixing,
    certify,
    chain,
    register_rule,
)

TOKENS, WIDTH = 3, 4
NORMS = ("l2", "token", "linf")


@keras.saving.register_keras_serializable("own_rules")
class Opaque(layers.Layer):
    """A layer whose code cannot be traced: only a rule gives it a constant."""

    def compute_output_spec(self, x, **kwargs):
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            raise RuntimeError("only on numbers")
        return self.compute(x)


class Bend(Opaque):
    """`scale * log(1 + exp(x))`, entry by entry."""

    scale = 0.5

    def compute(self, x):
        return self.scale * ops.softplus(x)


class Turned(Opaque):
    """A matrix on the channels, then a bend."""

    matrix = np.array(
        [[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [3.0, 0.0, 1.0, 0.0], [0, 0, 0, 1]]
    )

    def compute(self, x):
        return ops.tanh(x @ ops.convert_to_tensor(self.matrix, x.dtype))


class Smoothed(Opaque):
    """Each token and its successor, averaged."""

    def compute(self, x):
        return 0.5 * (x + ops.roll(x, 1, axis=1))


class Reflected(Opaque):
    """`2 f(x) - x` for a tanh."""

    def compute(self, x):
        return 2.0 * ops.tanh(x) - x


class Scaled(Opaque):
    """A number times the input, whose rule is only a number."""

    def compute(self, x):
        return -3.0 * x


class Doubled(Opaque):
    """Twice the input. Its rule says otherwise."""

    def compute(self, x):
        return 2.0 * x


class Far(Opaque):
    """Tokens far from the origin. Its rule says that they are near it."""

    def compute(self, x):
        return x + 5.0


@register_rule(Bend)
def bend(layer, call: LayerCall):
    return Elementwise(
        constant=layer.scale, value_at_zero=layer.scale * math.log(2.0), theorem="largest slope"
    )


@register_rule(Turned)
def turned(layer, call):
    norm = float(np.linalg.norm(layer.matrix, 2))
    if call.norm == "linf":
        norm = float(np.abs(layer.matrix).sum(axis=0).max())
    turn = Affine(constant=norm, matrix=layer.matrix, theorem="norm of the matrix")
    return chain(turn, Elementwise(constant=1.0, value_at_zero=0.0, theorem="largest slope"))


@register_rule(Smoothed)
def smoothed(layer, call):
    return TokenMixing(constant=1.0, theorem="average of neighbors")


@register_rule(Reflected)
def reflected(layer, call):
    return LipschitzMap(constant=1.0, theorem="slopes from -1 to 1")


@register_rule(Scaled)
def scaled(layer, call):
    return 3.0


@register_rule(Doubled)
def doubled(layer, call):
    return 1.5


@register_rule(Far)
def far(layer, call):
    return LipschitzMap(constant=1.0, range=call.state.range, theorem="a shift")


def model_of(layer, *, after=None):
    inputs = keras.Input((TOKENS, WIDTH), dtype="float64")
    outputs = layer(inputs)
    return keras.Model(inputs, outputs if after is None else after(outputs))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer_class", [Bend, Turned, Smoothed, Reflected, Scaled])
def test_the_constant_of_an_own_rule_dominates_every_jacobian(layer_class, norm):
    built = model_of(
        layer_class(dtype="float64"), after=layers.Dense(2, dtype="float64", use_bias=False)
    )
    certificate = certify(built, norm=norm, check=True)
    assert certificate.is_finite and certificate.rows[0].layer == layer_class.__name__
    points = np.random.default_rng(0).normal(size=(4, TOKENS, WIDTH))
    points[0] = 0.0
    for jacobian in jacobians(built, points):
        assert jacobian_norm(jacobian, norm, (WIDTH, 2)) <= certificate.total * (1.0 + 1e-9)


def test_linear_maps_of_an_own_rule_merge_with_their_neighbors():
    inverse = np.linalg.inv(Turned.matrix)

    class Unturned(Opaque):
        def compute(self, x):
            return x @ ops.convert_to_tensor(inverse, x.dtype)

    class Plain(Opaque):
        def compute(self, x):
            return x @ ops.convert_to_tensor(Turned.matrix, x.dtype)

    for layer_class, matrix in ((Plain, Turned.matrix), (Unturned, inverse)):
        register_rule(layer_class)(
            lambda layer, call, m=matrix: Affine(
                constant=float(np.linalg.norm(m, 2)), matrix=m, theorem="norm of the matrix"
            )
        )
    built = model_of(Plain(dtype="float64"), after=Unturned(dtype="float64"))
    assert certify(built).total == pytest.approx(1.0, rel=1e-6)


def test_branches_of_an_own_rule_merge():
    class Halved(Opaque):
        def compute(self, x):
            return x - 0.5 * x

    @register_rule(Halved)
    def halved(layer, call):
        return Combination(
            constant=1.5, operands=(call.state, call.state), coefficients=(1.0, -0.5)
        )

    assert certify(model_of(Halved())).total == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer_class", [Doubled, Far])
def test_an_own_rule_that_lies_is_refuted(layer_class, norm):
    built = model_of(layer_class())
    options: dict[str, Any] = {"input_radius": 1.0} if layer_class is Far else {}
    assert certify(built, norm=norm, **options).is_finite
    with pytest.raises(CertificateRefuted):
        certify(built, norm=norm, check=True, **options)


def test_an_own_rule_says_why_it_has_no_constant_and_what_to_do():
    class Refused(Opaque):
        def compute(self, x):
            return x

    @register_rule(Refused)
    def refused(layer, call):
        return LipschitzMap(
            constant=math.inf,
            reason=Reason("it divides by its input", remedy="add 1 to it", replacement="Softer"),
        )

    certificate = certify(model_of(Refused(name="refused")))
    assert certificate.reasons == ("`refused` (Refused): it divides by its input; add 1 to it",)
    assert certificate.proposals == ("1 Refused, no bound: use Softer",)
    assert Certificate.from_json(certificate.to_json()) == certificate


@pytest.mark.parametrize("norm", ["l2", "token"])
def test_local_certificates_use_own_rules(norm):
    built = model_of(Turned(dtype="float64"), after=layers.Dense(2, dtype="float64"))
    x = np.random.default_rng(1).normal(size=(TOKENS, WIDTH))
    local = certify(built, norm=norm, center=x, radius=0.1)
    assert local.total <= certify(built, norm=norm).total * (1.0 + 1e-9)
    (jacobian,) = jacobians(built, x[None])
    assert jacobian_norm(jacobian, norm, (WIDTH, 2)) <= local.total * (1.0 + 1e-9)


@pytest.mark.parametrize("name", certification.__all__)
def test_every_public_name_exists_and_has_a_docstring(name):
    assert getattr(certification, name).__doc__
