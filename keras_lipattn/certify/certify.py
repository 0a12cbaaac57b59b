"""From a model to its certificate."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from keras_lipattn.bounds.lipschitz_bound import NORMS
from keras_lipattn.certify import graph, rules
from keras_lipattn.certify.advance import side_by_side
from keras_lipattn.certify.around import check_ball, describe, examples_of
from keras_lipattn.certify.certificate import Certificate
from keras_lipattn.certify.certificate_row import CertificateRow
from keras_lipattn.certify.fingerprint import fingerprint_of
from keras_lipattn.certify.locality import Locality
from keras_lipattn.certify.margins import find_head, pair_constants
from keras_lipattn.certify.near import Near
from keras_lipattn.certify.options import Options
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.certify.threat_model import ThreatModel
from keras_lipattn.certify.values import require_float64
from keras_lipattn.certify.walk import Walk
from keras_lipattn.linalg import SAFETY

_OUTPUTS = {
    "softmax": "pre-softmax logits (the softmax at the end is left out)",
    "sigmoid": "pre-sigmoid logit of the one unit (the sigmoid at the end is left out)",
    "logits": "output, taken for logits",
    "logit": "output, taken for the logit of one unit",
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
    around: Any = None,
    radius: float | None = None,
) -> Certificate:
    """Proves a Lipschitz constant for a whole model, at inference, for the weights now loaded.

    Walks the graph of a Functional, Sequential or nested model, or what a subclassed model does
    when it is called symbolically, and composes the constants of its layers: sums for
    branches, products along chains, one norm for linear maps that follow each other. A layer
    without a rule is looked into; what stays unknown is `inf` with a reason. The model is not
    changed in any way: not its weights, losses, random state, traced functions, nor its graph.

    With `around` and `radius` the certificate is a local one: for inputs in the ball of this
    radius around a given input, in the chosen norm. It is never larger than the global one, and
    often much smaller: attention uses what it sees there (Theorem 6), normalisations the sizes of
    their tokens, products the sizes of their factors. Everything else keeps its global constant.
    Values at the centre are computed in float64, for the weights as they run.

    Args:
        model: a built `keras.Model`.
        norm: `"l2"` (2-norm of all entries), `"token"` (largest Euclidean norm of a token, where
            tokens are all axes but the batch and the last one) or `"linf"` (largest absolute
            entry), of inputs and outputs alike. Several inputs count side by side.
        sequence_length: largest length of an input with one axis of unknown size.
        input_radius: if given, the certificate is only for inputs whose tokens have at most this
            Euclidean norm. Some layers have a finite constant only then.
        assume_fixed_mask: whether to certify for masks that stay fixed even where the model
            computes them from a certified input. The certificate then says so.
        mask: class of the masks of attention layers that get one whose values are not in the graph,
            or may get padding from outside: `"full"`, `"causal"`, `"any"`, or a boolean array of
            visible pairs. `None`: none from outside, and `"any"` for those in the graph.
        inputs: for subclassed models, what they are called on: arrays, or `keras.KerasTensor`s, in
            the structure of the call. By default the shape they were built with, as floats.
        around: for a local certificate, the centre: one example (no batch axis) in the structure of
            the call, or a batch of examples. For a batch the certificate holds in each of the
            balls: its total and its pairs are the largest of all, its rows are those of the
            example with the largest total. Lengths and masks are those of the examples; integers
            stay fixed, and the ball is around their embeddings.
        radius: radius of the balls, in the norm `norm`. 0 bounds the Jacobian at the centre.

    Returns:
        A `Certificate`.

    Raises:
        ValueError: if `model` is not a built model, an argument is out of range, or only one of
            `around` and `radius` is given.

    Example:

    >>> inputs = keras.Input((16, 32))
    >>> x = keras_lipattn.L2MultiHeadAttention(4, 8)(inputs)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(inputs, keras.layers.Dense(10)(x))
    >>> print(keras_lipattn.certify(model))

    Reference: docs/theory.md, sections 3 to 5 for attention, 6 for local certificates, 8 for
        everything else.
    """
    _check_arguments(model, norm, sequence_length, input_radius, mask)
    check_ball(around, radius)
    options = Options(
        norm=norm,
        sequence_length=sequence_length,
        input_radius=input_radius,
        assume_fixed_mask=assume_fixed_mask,
        mask=mask,
    )
    if around is not None:
        return local_certificate(model, options, inputs, around, float(radius or 0.0))[0]
    walk = Walk(options)
    with graph.names_kept():
        outputs, head = _walk_model(walk, model, inputs)
    return _certificate(walk, model, outputs, head)


def local_certificate(
    model: keras.Model, options: Options, inputs: Any, around: Any, radius: float
) -> tuple[Certificate, list[Near | None]]:
    """The certificate near some inputs, and for each of them what is known about the output."""
    require_float64()
    if options.sequence_length is not None:
        raise ValueError(
            "`around` has a length of its own. "
            f"Received: sequence_length={options.sequence_length} beside `around`"
        )
    structure, examples = examples_of(model, around)
    _check_inside(options.input_radius, examples)
    if inputs is None:
        inputs = _specs(model, structure)
    certificates, nears = [], []
    for example in examples:
        locality = Locality(example, radius, options.norm)
        with graph.names_kept():
            walk = Walk(dataclasses.replace(options, norm="l2"), locality)
            outputs, head = _walk_model(walk, model, inputs)
            nears.append(outputs[0].near)
            if options.norm != "l2":
                walk = Walk(options, locality)
                outputs, head = _walk_model(walk, model, inputs)
        certificates.append(_certificate(walk, model, outputs, head))
    worst = max(certificates, key=lambda one: one.total)
    pairs = np.max([one.pairs for one in certificates], axis=0)
    # Dot-product attention is bounded by where its tokens are: a smaller ball with another centre
    # may give more than the larger one.
    with graph.names_kept():
        walk = Walk(options)
        everywhere = _certificate(walk, model, *_walk_model(walk, model, inputs))
    if everywhere.total < worst.total:
        worst = everywhere
    if everywhere.pairs and everywhere.is_finite:
        pairs = np.minimum(pairs, everywhere.pairs)
    lost = {path: reason for one in certificates for path, reason in one.threat_model.lost}
    threat = dataclasses.replace(
        worst.threat_model, around=describe(examples), radius=radius, lost=tuple(lost.items())
    )
    total = dataclasses.replace(
        worst,
        threat_model=threat,
        pairs=tuple(tuple(float(value) for value in row) for row in pairs),
    )
    return total, nears


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
                    "The tokens of `around` must have a norm of at most `input_radius`. "
                    f"Received: input_radius={input_radius}, largest norm {largest:g}"
                )


def _specs(model: keras.Model, structure: Any) -> Any:
    """What a subclassed model is called on: floats in its own dtype, everything else as it is."""

    def spec(array):
        dtype = model.input_dtype if array.dtype.kind == "f" else array.dtype.name
        return keras.KerasTensor((None, *array.shape[1:]), dtype=dtype)

    return keras.tree.map_structure(spec, structure)


def _walk_model(walk: Walk, model: keras.Model, inputs: Any) -> tuple[list[TensorState], str]:
    function = graph.function_of(model)
    if function is not None:
        states = [
            walk.input_state(name, tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in zip(graph.input_names(function), function.inputs, strict=True)
        ]
        states = walk.begin(states)
        head, walk.logit_nodes = find_head(function)
        return walk.run(function, states, "", model, traced=False), head
    arguments = graph.call_arguments(model, inputs)
    counter = iter(range(1, 10**6))

    def state_of(tensor):
        name = f"input {next(counter)} of shape {tuple(tensor.shape[1:])}"
        sizes = list(tensor.shape[1:])
        if walk.options.sequence_length is not None and None not in sizes and len(sizes) > 1:
            # A subclassed model keeps the length it was first called with, and takes others.
            sizes[0] = None
        return walk.input_state(name, tuple(sizes), keras.backend.standardize_dtype(tensor.dtype))

    args: Any = keras.tree.map_structure(state_of, arguments)
    flat = walk.begin(keras.tree.flatten(args))
    args = keras.tree.pack_sequence_as(args, flat)
    given = [leaf for leaf in keras.tree.flatten(args) if isinstance(leaf, TensorState)]
    try:
        function, states = graph.trace(model, args, {}, walk.mask_state)
    except graph.TraceError as error:
        step = Step(constant=math.inf, reason=f"it is not a Functional model, and {error}")
        layout = dict(shape=(), dynamic=(), dtype="float32")
        return walk.record(model, step, given, model.name, [layout]), ""
    head, walk.logit_nodes = find_head(function)
    return walk.run(function, states, "", model, traced=True), head


def _certificate(
    walk: Walk, model: keras.Model, outputs: list[TensorState], head: str
) -> Certificate:
    norm = walk.options.norm
    conflicts = sorted(walk.relaxed_inputs & set(walk.held_inputs))
    if conflicts:
        names = ", ".join(walk.sources[index] for index in conflicts)
        step = Step(
            constant=math.inf,
            reason=f"the integer input {names} is looked up here and computed with there",
        )
        outputs = walk.record(
            model, step, outputs, "inputs", [dict(shape=(), dynamic=(), dtype="")]
        )
        head = ""
    used = [name for index, name in enumerate(walk.sources) if index not in walk.held_inputs]
    gain, published = side_by_side(norm, outputs)
    log, published_log = gain.log, published.log
    if not used:
        log = published_log = math.inf
    log, published_log = (value + math.log(SAFETY) for value in (log, published_log))
    total, published_total = _exp(log), _exp(published_log)
    costs: dict[int, float] = {}
    for state in outputs:
        # Several outputs side by side: their costs count by their weights.
        weight = math.exp(2.0 * (state.gain.log - gain.log)) if math.isfinite(gain.log) else 0.0
        for row, cost in state.costs.items():
            costs[row] = costs.get(row, 0.0) + weight * cost
    rows = _rows(walk, costs, log)
    lengths = [*walk.longest]
    if walk.options.sequence_length is not None:
        lengths.append(int(walk.options.sequence_length))
    return Certificate(
        model=model.name,
        total=total,
        log10=log / math.log(10.0),
        published_total=published_total,
        published_log10=published_log / math.log(10.0),
        threat_model=ThreatModel(
            norm=norm,
            inputs=tuple(used),
            held=tuple(walk.held_names),
            output=_OUTPUTS[head],
            input_radius=math.inf
            if walk.options.input_radius is None
            else float(walk.options.input_radius),
            longest=min(lengths, default=None),
            mask=walk.options.mask if isinstance(walk.options.mask, str | None) else "given",
            assumed_masks=tuple(dict.fromkeys(walk.assumed_masks)),
            lost=() if walk.locality is None else tuple(walk.locality.lost.items()),
        ),
        rows=rows,
        head=head,
        pairs=pair_constants(outputs[0], total, norm) if head in ("softmax", "logits") else (),
        fingerprint=fingerprint_of(model),
    )


def _rows(walk: Walk, costs: dict[int, float], log: float) -> tuple[CertificateRow, ...]:
    unbounded = sum(math.isinf(draft.constant) for draft in walk.rows)
    rows = []
    for index, draft in enumerate(walk.rows):
        cost = costs.get(index, 0.0)
        if math.isinf(log):
            infinite = math.isinf(draft.constant)
            cost = math.inf if infinite else 0.0
            share = 1.0 / unbounded if infinite else 0.0
        else:
            share = cost / log if abs(log) > 1e-6 else None
        rows.append(
            CertificateRow(
                path=draft.path,
                layer=draft.layer_class,
                constant=draft.constant,
                published=draft.published,
                radius=draft.radius,
                tokens=draft.tokens,
                theorem=draft.theorem,
                reason=draft.reason,
                exact=draft.exact,
                cost=cost,
                share=share,
            )
        )
    return tuple(rows)


def _check_arguments(model, norm, sequence_length, input_radius, mask) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {sorted(NORMS)}. Received: norm={norm!r}")
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
    if not model.built:
        raise ValueError(
            "The model has no weights yet: build it, or call it on data, before certifying it. "
            f"Received: built={model.built}"
        )


def _exp(log: float) -> float:
    return math.exp(log) if log < 709.7 else math.inf


__all__ = ["certify", "rules"]
