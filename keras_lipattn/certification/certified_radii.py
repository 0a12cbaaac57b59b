"""Certified radii of single inputs, from local certificates."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from keras_lipattn._arguments import require_nonnegative, require_positive_integer
from keras_lipattn.certification.centers import examples_of
from keras_lipattn.certification.certificate import Certificate
from keras_lipattn.certification.certifying import LocalCertifier, certify, specs_of_examples
from keras_lipattn.certification.classifier_head import logits_of
from keras_lipattn.certification.coverage import are_covered
from keras_lipattn.certification.keras_models import call_specs, function_of
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.tensor_state import Enclosure
from keras_lipattn.layers import lipschitz_layers
from keras_lipattn.linalg import SAFETY

# Factor of the radius of the global certificate to try first.
_JUST_ABOVE = 1.001
# The search ends when the best radius is known up to this factor.
_CLOSE = 1.0001


def certified_radius(
    model: keras.Model,
    x: Any,
    norm: str = "l2",
    *,
    steps: int = 10,
    allowance: float = 0.0,
    **options: Any,
) -> np.ndarray:
    """Radii around inputs within which the class that a model predicts provably stays.

    `certify(model).certified_radius(logits)` divides the margin of the logits by a constant that
    holds for all inputs. This function uses the smaller constants `L(r)` of
    `certify(model, center=x, radius=r)` and finds the largest `r` for which the margin exceeds
    `sqrt(2) L(r) r`, or the corresponding bound for each pair of classes. The search takes for
    granted that `L(r)` grows with `r`; where it does not, a larger radius may be missed. Every
    radius it returns is certified, and is never smaller than that of the global certificate for the
    same margins.

    The logits at `x` are computed in float64, and a bound of their rounding is subtracted from the
    margins. Layers with caps whose norms are not known yet remember them first, as by
    `layer.condense()`. Where values are not known, such as after a layer whose code does not run in
    float64 or a cap that depends on an `attention_mask`, the logits are those that the model
    returns. Then only `allowance` covers their rounding.

    Args:
        model: a built classifier.
        x: one input of the model without a batch axis, or a batch.
        norm: norm of the balls, `"l2"`, `"token"` or `"linf"`, see `certify`.
        steps: largest number of certificates per example.
        allowance: subtracted from every margin, for the rounding of the logits that are served.
        **options: further arguments of `certify`, such as `assume_fixed_mask=True`.

    Returns:
        An array of shape `(examples,)`, or `()` for one input; 0 at ties and where nothing is
        certified.

    Raises:
        ValueError: if the model is not a classifier, the backend has no float64, or an argument is
            out of range.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(8, activation="tanh")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(3)(x))
    >>> x = np.random.default_rng(0).normal(size=(2, 4))
    >>> radii = keras_lipattn.certified_radius(model, x)
    >>> globally = keras_lipattn.certify(model).certified_radius(model.predict(x, verbose=0))
    >>> bool(np.all(radii >= 0.99 * globally))
    True

    Reference: docs/theory.md, sections 6 and 8.
    """
    require_positive_integer("steps", steps)
    require_nonnegative("allowance", allowance)
    structure, _ = examples_of(model, x)
    _remember_caps(model)
    inputs = options.pop("inputs", None)
    if function_of(model) is None and inputs is None:
        # It may have been built for another length.
        inputs = specs_of_examples(model, structure)
    globally = certify(model, norm, inputs=inputs, **options)
    if globally.head == "token logits":
        raise ValueError(
            "`model` must return one vector of logits per example. For logits of every token use "
            "`certify(model).certified_radius(logits)`. Received: a model whose head is "
            f"{globally.head!r}"
        )
    options.pop("check", None)
    certifier = LocalCertifier(model, Options(norm=norm, **options), inputs, x)
    covered = keras.ops.convert_to_numpy(are_covered(globally, model, structure))
    radii = []
    for index, example in enumerate(certifier.examples):
        one = keras.tree.map_structure(lambda array, i=index: array[i : i + 1], structure)

        def near(radius: float, example=example, one=one) -> tuple[Certificate, Enclosure]:
            certificate, (found,) = certifier.near([example], radius)
            if found is None:
                # Only the logits are not known: the constants hold all the same.
                found = Enclosure(_predicted_logits(model, one, certificate.head))
            return certificate, found

        radii.append(_radius(near, globally if covered[index] else None, steps, allowance))
    single = np.ndim(keras.tree.flatten(x)[0]) < keras.tree.flatten(structure)[0].ndim
    return np.asarray(radii[0] if single else radii)


def _remember_caps(model: keras.Model) -> None:
    """Makes the weights used at inference known on the host."""
    for layer in lipschitz_layers(model):
        if layer.built and not layer.caps_are_exact():
            layer.condense()


def _predicted_logits(model: keras.Model, x: Any, head: str) -> np.ndarray:
    options = {"training": False} if model._call_has_training_arg else {}
    arguments = keras.tree.pack_sequence_as(call_specs(model, x)[0], keras.tree.flatten(x))
    with keras.StatelessScope(collect_losses=True):
        (output,) = keras.tree.flatten(model(*arguments, **options))
    return logits_of(keras.ops.convert_to_numpy(output), head)


def _radius(near, globally: Certificate | None, steps: int, allowance: float) -> float:
    certificate, center = near(0.0)
    logits = center.value[0]
    allowance = allowance + 2.0 * SAFETY * center.rounding_error
    low = 0.0
    if globally is not None:
        low = float(globally.certified_radius(logits, allowance=allowance))
    high = _uncapped(certificate, logits, allowance)
    if math.isinf(high):
        high = 10.0 * (1.0 + float(np.linalg.norm(logits)))
    tried_high = False
    for step in range(steps):
        if not _CLOSE * low < high:
            break
        is_probe = step == 0 and low > 0.0
        if is_probe:
            middle = min(_JUST_ABOVE * low, high)
        elif not tried_high:
            # The best radius if the constant is the same in larger balls.
            middle = high / _CLOSE
        else:
            # The best radius may be orders of magnitude above the global one.
            middle = math.sqrt(low * high) if low > 0.0 else 0.5 * high
        found = _uncapped(near(middle)[0], logits, allowance)
        # Within the ball the constant holds, so what it gives is certified as far as the ball.
        low = max(low, min(found, middle))
        # In a larger ball the constant is larger, which gives no more than this one.
        high = min(high, max(found, middle))
        if found < middle:
            tried_high = True
            if is_probe:
                # The local constant is that of all inputs already.
                break
    return low


def _uncapped(certificate: Certificate, logits: np.ndarray, allowance: float) -> float:
    """The radius that the constant gives, even where the certificate does not cover it."""
    everywhere = dataclasses.replace(certificate.threat_model, radius=math.inf)
    certificate = dataclasses.replace(certificate, threat_model=everywhere, content_hash="")
    return float(certificate.certified_radius(logits, allowance=allowance))
