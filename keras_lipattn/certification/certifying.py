"""Certification of a model: `certify`, and local certificates."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.certification import rules as _rules  # registers the rules
from keras_lipattn.certification.centers import check_ball, describe, examples_of
from keras_lipattn.certification.certificate import Certificate, CertificateRow
from keras_lipattn.certification.classifier_head import pairwise_constants
from keras_lipattn.certification.evaluation import require_float64
from keras_lipattn.certification.fingerprint import fingerprint_of
from keras_lipattn.certification.local_pass import LocalPass
from keras_lipattn.certification.maps import side_by_side
from keras_lipattn.certification.options import Options
from keras_lipattn.certification.propagation import Propagation
from keras_lipattn.certification.reasons import Cause, Reason
from keras_lipattn.certification.self_check import check_certificate
from keras_lipattn.certification.tensor_state import Enclosure, TensorState
from keras_lipattn.certification.threat_model import ThreatModel
from keras_lipattn.certification.trace import TraceError
from keras_lipattn.certification.traced_model import TracedModel
from keras_lipattn.linalg import SAFETY

_OUTPUTS = {
    "softmax": "pre-softmax logits (the softmax at the end is left out)",
    "sigmoid": "pre-sigmoid logit of the single unit (the sigmoid at the end is left out)",
    "logits": "output, taken as logits",
    "logit": "output, taken as the logit of a single unit",
    "token logits": "output",
    "": "output",
}


def certify(
    model: keras.Model,
    norm: str = "l2",
    sequence_length: int | None = None,
    input_radius: float | None = None,
    assume_fixed_mask: bool = False,
    mask: Any = None,
    inputs: Any = None,
    center: Any = None,
    radius: float | None = None,
    check: bool = False,
) -> Certificate:
    """Proves a Lipschitz constant of a whole model, at inference, for its current weights.

    Keras runs the model on symbolic tensors, and the constants of all calls are composed: sums for
    branches, products along chains, one norm for consecutive linear maps. The code of a layer
    without a rule is certified operation by operation. A call without a bound makes the total
    `inf`; `Certificate.reasons` says why and what to do. The certificate holds for any number of
    examples: an operation that mixes the examples of a batch has no bound. Code that runs on an
    axis of unknown size is certified only for the length it ran at. The model does not change:
    neither its weights and losses nor its random state, traced functions and graph.

    With `center` and `radius` the certificate is local: it holds for inputs in the ball of this
    radius around a given input, in the chosen norm. A local constant is never larger than the
    global one and often much smaller: the bound of attention uses the attention weights at the
    center (Theorem 6), that of a normalization the norms of its tokens, that of a product the sizes
    of its factors. All other layers keep their global constants. The values at the center are
    computed in float64 with the weights used at inference.

    Args:
        model: a built `keras.Model`.
        norm: norm of inputs and outputs: `"l2"` (2-norm of all entries), `"token"` (largest
            Euclidean norm of a token; tokens are indexed by all axes but the batch and the last
            one) or `"linf"` (largest absolute entry). Several inputs count as one tensor.
        sequence_length: largest length of an input with one axis of unknown size. Where Python code
            of a layer runs on that axis, the certificate is for exactly this length, and says so.
        input_radius: if given, the certificate holds only for inputs whose tokens have at most this
            Euclidean norm. Some layers have a finite constant only then.
        assume_fixed_mask: whether to assume that masks do not change even where the model computes
            them from a certified input. The certificate states the assumption.
        mask: class of the masks of attention layers whose values are not known from the graph:
            `"full"`, `"causal"`, `"any"`, or a boolean array of visible pairs. By default, `"any"`
            for masks in the graph, and no masks other than those in the graph.
        inputs: for subclassed models, the inputs of a call: arrays or `keras.KerasTensor`s, in the
            structure of the call. By default, floats of the shape that the model was built with.
        center: for a local certificate, the center: one example (no batch axis) in the structure of
            the call, or a batch of examples. For a batch, the certificate holds in each of the
            balls: its total and its pairwise constants are the largest of all, its rows are those
            of the example with the largest total. Lengths and masks are those of the examples.
            Integers stay fixed, and the ball is around their embeddings.
        radius: radius of the balls, in the norm `norm`. 0 bounds the Jacobian at the center.
        check: whether to try to refute the certificate before it is returned, on random and extreme
            inputs. This takes about a dozen forward passes on five examples, or five passes for a
            model of more than five million weights. See `CertificateRefuted`.

    Returns:
        A `Certificate`.

    Raises:
        ValueError: if `model` is not a built model, an argument is out of range, or only one of
            `center` and `radius` is given.
        CertificateRefuted: with `check=True`, if a measurement contradicts the certificate. This is
            an error in this package or in a rule of your own; please report the former.

    Example:

    >>> import keras, keras_lipattn
    >>> inputs = keras.Input((16, 32))
    >>> x = keras_lipattn.L2MultiHeadAttention(4, 8, lipschitz_bound=1.0)(inputs)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(inputs, keras_lipattn.SpectralDense(10, spectral_norm=1.0)(x))
    >>> certificate = keras_lipattn.certify(model)
    >>> certificate.total <= 0.251
    True

    Reference: docs/certification.md for what is certified and how to write rules; docs/theory.md,
        sections 3 to 5 for attention, 6 for local certificates, 8 for other layers.
    """
    _check_arguments(model, norm, sequence_length, input_radius, mask)
    check_ball(center, radius)
    options = Options(
        norm=norm,
        sequence_length=sequence_length,
        input_radius=input_radius,
        assume_fixed_mask=assume_fixed_mask,
        mask=mask,
    )
    if center is not None:
        certifier = LocalCertifier(model, options, inputs, center)
        return certifier.near(certifier.examples, float(radius or 0.0))[0]
    traced = TracedModel(model, inputs, sequence_length)
    propagation, certificate = _certify_traced(traced, options)
    if check:
        check_certificate(traced, propagation, certificate)
    return certificate


def _certify_traced(
    traced: TracedModel, options: Options, local: LocalPass | None = None
) -> tuple[Propagation, Certificate]:
    propagation = Propagation(
        traced.trace, traced.comparison, options, local, logit_call=traced.logit_call
    )
    if traced.failure:
        return propagation, _certificate(traced, propagation, _refused(traced, propagation))
    outputs = propagation.run(traced.names)
    return propagation, _certificate(traced, propagation, outputs)


def _refused(traced: TracedModel, propagation: Propagation) -> list[TensorState]:
    """The outputs of a model that could not be traced."""
    states = [
        propagation._input_state(name, propagation._layout(tensor))
        for name, tensor in zip(traced.names, traced.trace.inputs, strict=True)
    ]
    model = traced.model
    reason = traced.failure or Reason()
    if reason.cause in (Cause.CODE, Cause.LAYER) and reason.remedy is None:
        remedy = "write it with `keras.ops`, and pass `inputs` if it takes other shapes or dtypes"
        reason = dataclasses.replace(reason, remedy=remedy)
    reason = reason.with_remedy(model, has_rule=False)
    return [propagation.refuse(model.name, type(model).__name__, reason, states)]


class LocalCertifier:
    """Certificates of a model near some inputs, for the weights it has now.

    The model is traced once for all of them.

    Args:
        model: a built model.
        options: arguments of `certify`.
        inputs: for models without a graph, the inputs of a call, see `certify`.
        center: one example or a batch, see `certify`.

    Attributes:
        structure: the batch, in the structure of the call.
        examples: for each example, the flat list of its inputs, each of shape `(1, ...)`.
    """

    def __init__(self, model: keras.Model, options: Options, inputs: Any, center: Any):
        require_float64()
        if options.sequence_length is not None:
            raise ValueError(
                "`sequence_length` must be omitted with `center`, which has its own length. "
                f"Received: sequence_length={options.sequence_length}"
            )
        self.structure, self.examples = examples_of(model, center)
        _check_inside(options.input_radius, self.examples)
        if inputs is None:
            inputs = specs_of_examples(model, self.structure)
        shapes = [array.shape[1:] for array in self.examples[0]]
        self._options = options
        self._traced = TracedModel(model, inputs, shapes=shapes)

    def near(
        self, examples: Sequence[list[np.ndarray]], radius: float
    ) -> tuple[Certificate, list[Enclosure | None]]:
        """The certificate near some of the examples, and for each the enclosure of the output."""
        found = [self._near(example, radius) for example in examples]
        certificates = [certificate for certificate, _ in found]
        worst = max(certificates, key=lambda one: one.total)
        pairs = np.max([one.pairwise_constants for one in certificates], axis=0)
        lost = {path: reason for one in certificates for path, reason in one.threat_model.lost}
        # The bound of dot-product attention depends on the ball that holds its tokens. A smaller
        # ball with another center may give a larger bound than the global ball.
        everywhere = self._everywhere
        if everywhere.total < worst.total:
            worst = everywhere
        if everywhere.pairwise_constants and everywhere.is_finite:
            pairs = np.minimum(pairs, everywhere.pairwise_constants)
        threat = dataclasses.replace(
            worst.threat_model,
            center=describe(examples),
            radius=radius,
            lost=tuple(lost.items()),
        )
        certificate = dataclasses.replace(
            worst,
            threat_model=threat,
            pairwise_constants=tuple(tuple(float(value) for value in row) for row in pairs),
            content_hash="",
        )
        return certificate, [enclosure for _, enclosure in found]

    @functools.cached_property
    def _everywhere(self) -> Certificate:
        return _certify_traced(self._traced, self._options)[1]

    def _near(self, example, radius: float) -> tuple[Certificate, Enclosure | None]:
        traced, options = self._traced, self._options
        try:
            local = LocalPass(
                traced.single, example, radius, options.norm, logit_call=traced.logit_call
            )
        except TraceError:
            # Without a trace there are no values.
            return self._everywhere, None
        in_l2, certificate = _certify_traced(traced, dataclasses.replace(options, norm="l2"), local)
        found = None if traced.failure else in_l2.state_of(traced.trace.outputs[0]).enclosure
        if options.norm != "l2":
            _, certificate = _certify_traced(traced, options, local)
        threat = dataclasses.replace(certificate.threat_model, lost=tuple(local.lost.items()))
        return dataclasses.replace(certificate, threat_model=threat, content_hash=""), found


def _check_inside(input_radius, examples) -> None:
    if input_radius is None:
        return
    for example in examples:
        for array in example:
            if array.dtype.kind != "f":
                continue
            largest = float(np.linalg.norm(array, axis=-1).max(initial=0.0))
            if largest > input_radius * (1.0 + 1e-9):
                raise ValueError(
                    "The tokens of `center` must have a norm of at most `input_radius`. "
                    f"Received: input_radius={input_radius}, largest norm {largest:g}"
                )


def specs_of_examples(model: keras.Model, structure: Any) -> Any:
    """The inputs of a subclassed model: floats in its own dtype, everything else unchanged."""

    def spec(array):
        dtype = model.input_dtype if array.dtype.kind == "f" else array.dtype.name
        return keras.KerasTensor((None, *array.shape[1:]), dtype=dtype)

    return keras.tree.map_structure(spec, structure)


def _certificate(
    traced: TracedModel, propagation: Propagation, outputs: list[TensorState]
) -> Certificate:
    model, head = traced.model, traced.head
    norm = propagation.options.norm
    conflicts = sorted(propagation.computed_inputs & set(propagation.looked_up_inputs))
    if conflicts:
        names = ", ".join(propagation.inputs[index] for index in conflicts)
        reason = Reason(
            f"the integer input {names} is looked up in one place and computed with in another",
            remedy="make two inputs of it",
        )
        outputs = [propagation.refuse("inputs", type(model).__name__, reason, outputs)]
        head = ""
    used = [
        name
        for index, name in enumerate(propagation.inputs)
        if index not in propagation.looked_up_inputs
    ]
    gain, published = side_by_side(norm, outputs)
    log, published_log = gain.log, published.log
    if not used:
        log = published_log = math.inf
    log, published_log = (value + math.log(SAFETY) for value in (log, published_log))
    total, published_total = _exp(log), _exp(published_log)
    costs: dict[int, float] = {}
    for state in outputs:
        # The costs of several outputs are weighted by their shares in the total.
        weight = math.exp(2.0 * (state.gain.log - gain.log)) if math.isfinite(gain.log) else 0.0
        for row, cost in state.costs.items():
            costs[row] = costs.get(row, 0.0) + weight * cost
    options = propagation.options
    lengths = [*propagation.max_tokens]
    if options.sequence_length is not None:
        lengths.append(int(options.sequence_length))
    pairs = pairwise_constants(outputs[0], total, norm) if head in ("softmax", "logits") else ()
    return Certificate(
        model=model.name,
        total=total,
        log10=log / math.log(10.0),
        published_total=published_total,
        published_log10=published_log / math.log(10.0),
        threat_model=ThreatModel(
            norm=norm,
            inputs=tuple(used),
            fixed_inputs=tuple(propagation.fixed_inputs),
            output=_OUTPUTS[head],
            input_radius=math.inf if options.input_radius is None else float(options.input_radius),
            max_tokens=min(lengths, default=None),
            shapes=traced.shapes if traced.only_for_its_shapes else (),
            mask=options.mask if isinstance(options.mask, str | None) else "given",
            assumed_masks=tuple(dict.fromkeys(propagation.assumed_masks)),
        ),
        rows=_rows(propagation, costs, log),
        head=head,
        pairwise_constants=pairs,
        fingerprint=fingerprint_of(model),
    )


def _rows(propagation: Propagation, costs: dict[int, float], log: float):
    rows = []
    for index, row in enumerate(propagation.rows):
        cost = costs.get(index, 0.0)
        if math.isinf(log):
            cost = math.inf if math.isinf(row.map.constant) else 0.0
        rows.append(
            CertificateRow(
                path=row.path,
                layer=row.layer_class,
                constant=row.map.constant,
                published=row.map.published,
                radius=row.radius,
                tokens=row.tokens,
                theorem=row.map.theorem,
                reason=str(row.reason),
                replacement=row.reason.replacement,
                exact=row.map.exact,
                cost=cost,
                explained_by=row.explained_by,
            )
        )
    return tuple(rows)


def _check_arguments(model, norm, sequence_length, input_radius, mask) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not isinstance(norm, str) or norm not in NORMS:
        raise ValueError(
            f"`norm` must be one of {sorted(NORMS)}. "
            f"Received: norm={norm!r} of type {type(norm).__name__}"
        )
    if sequence_length is not None and (
        isinstance(sequence_length, bool)
        or not isinstance(sequence_length, int | np.integer)
        or sequence_length < 1
    ):
        raise ValueError(
            "`sequence_length` must be a positive integer. "
            f"Received: sequence_length={sequence_length!r}"
        )
    if input_radius is not None and not (
        isinstance(input_radius, int | float | np.number) and 0.0 < float(input_radius) < math.inf
    ):
        raise ValueError(
            "`input_radius` must be a positive finite number. "
            f"Received: input_radius={input_radius!r}"
        )
    if isinstance(mask, str) and mask not in ("full", "causal", "any"):
        raise ValueError(
            f'`mask` must be "full", "causal", "any" or a boolean array. Received: mask={mask!r}'
        )
    if mask is not None and not isinstance(mask, str):
        visible = np.asarray(mask)
        if visible.dtype != bool or visible.ndim < 2 or visible.shape[-1] != visible.shape[-2]:
            raise ValueError(
                "An array `mask` must be boolean and say for each pair of tokens whether the first "
                "sees the second, shape (tokens, tokens). Masks of padded tokens that are inputs "
                "of the model, or computed from such inputs, are known without it. "
                f"Received: mask of shape {visible.shape} and dtype {visible.dtype}"
            )
    if not model.built:
        raise ValueError(
            "The model has no weights yet: build it, or call it on data, before certifying it. "
            f"Received: built={model.built}"
        )


def _exp(log: float) -> float:
    return math.exp(log) if log < 709.7 else math.inf


__all__ = ["LocalCertifier", "_rules", "certify", "specs_of_examples"]
