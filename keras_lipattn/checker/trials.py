"""Attempts to refute an export through its own signatures."""

import math
from typing import Any

import numpy as np

from keras_lipattn.checker.propagation import Propagation
from keras_lipattn.checker.refusal import require
from keras_lipattn.linalg import SAFETY

# Random pairs of classes that are tried at most.
_MOST_PAIRS = 4096
_ROWS = 256
_BATCH = 8
_ASCENTS = 6


def try_radii(propagation: Propagation, logits: str) -> None:
    """Compare the radii of `certified` with those that the certificate allows."""
    _try_logits(propagation, logits)
    _try_inputs(propagation, logits)


def allowed_radius(propagation: Propagation, logits: np.ndarray) -> np.ndarray:
    """The radii that the certificate gives for logits `(batch, classes)`."""
    certificate = propagation.certificate
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z).all():
        finite: Any = np.isfinite(z).all(axis=1)
        return np.where(finite, allowed_radius(propagation, np.where(finite[:, None], z, 0.0)), 0.0)
    if certificate.head in ("sigmoid", "logit"):
        return np.abs(z[:, 0]) / certificate.total
    classes, winner = z.shape[1], z.argmax(axis=1)
    general = certificate.total * (2.0 if certificate.norm == "linf" else SAFETY * math.sqrt(2.0))
    pairs = np.asarray(certificate.pairs) if certificate.pairs else np.full([classes] * 2, general)
    pairs = np.asarray(pairs, np.float64)
    leads = np.take_along_axis(z, winner[:, None], axis=1) - z
    own = np.arange(classes) == winner[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        radii = np.where(leads > 0.0, leads / pairs[winner], 0.0)
    return np.where(own, np.inf, radii).min(axis=1)


def _check_class(propagation: Propagation, logits: np.ndarray, found: np.ndarray, margin) -> None:
    """Refuse a class that is not that of the logits, or another margin."""
    if propagation.certificate.head in ("sigmoid", "logit"):
        winner, lead = logits[:, 0] > 0.0, np.abs(logits[:, 0])
    else:
        ranked = np.sort(logits, axis=1)
        winner, lead = logits.argmax(axis=1), ranked[:, -1] - ranked[:, -2]
    require(
        bool((found == winner).all()),
        "the signature `certified` gives a class that is not the one of its logits",
    )
    require(
        bool(np.allclose(margin, lead, rtol=1e-5, atol=1e-5 * np.abs(logits).max(initial=0.0))),
        "the signature `certified` gives a margin that is not the one of its logits",
    )


def _radius(propagation: Propagation) -> str:
    (radius,) = (name for name in propagation.served.outputs if name.endswith("radius"))
    return propagation.served.outputs[radius]


def _try_logits(propagation: Propagation, logits: str) -> None:
    """Logits in which each pair of classes decides."""
    certificate, served = propagation.certificate, propagation.served
    (classes,) = propagation.sizes(logits)[-1]
    if certificate.head in ("sigmoid", "logit"):
        rows = np.array([[-30.0], [-1.0], [0.0], [1.0], [30.0]])
    else:
        winners, rivals = (index.ravel() for index in np.indices((classes, classes)))
        winners, rivals = winners[winners != rivals], rivals[winners != rivals]
        if len(winners) > _MOST_PAIRS:
            chosen = np.random.default_rng(1).choice(len(winners), _MOST_PAIRS, replace=False)
            winners, rivals = winners[chosen], rivals[chosen]
        pairs = np.asarray(certificate.pairs) if certificate.pairs else np.ones([classes] * 2)
        rows = np.zeros((len(winners), classes))
        for row, winner, rival in zip(rows, winners, rivals, strict=True):
            own = max(pairs[winner, rival], 1e-300)
            row -= np.clip(2.0 * pairs[winner] / own, 2.0, 1e6)
            row[winner], row[rival] = 0.0, -1.0
    for start in range(0, len(rows), _ROWS):
        batch = rows[start : start + _ROWS]
        feeds = propagation.random_inputs(len(batch), propagation.lengths[-1])
        feeds = {name: np.zeros_like(value) for name, value in feeds.items()}
        feeds[logits] = batch
        names = [_radius(propagation), served.outputs["class"], served.outputs["margin"]]
        found, winner, margin = served.run(feeds, names)
        _check_class(propagation, batch, winner, margin)
        _check(found, allowed_radius(propagation, batch.astype(np.float32)), "for given logits")


def _try_inputs(propagation: Propagation, logits: str) -> None:
    certificate, served = propagation.certificate, propagation.served
    longest = propagation.lengths[-1]
    radius, limit = _radius(propagation), certificate.limit
    for scale in (0.1, 1.0, 10.0):
        feeds = propagation.random_inputs(_BATCH, longest)
        feeds = {
            name: propagation.inside(scale * x) if x.dtype.kind == "f" else x
            for name, x in feeds.items()
        }
        names = [logits, radius, served.outputs["class"], served.outputs["margin"]]
        z, found, winner, margin = served.run(feeds, names)
        _check_class(propagation, np.asarray(z, np.float64), winner, margin)
        allowed = allowed_radius(propagation, z)
        if limit is not None:
            for x in feeds.values():
                if x.dtype.kind != "f":
                    continue
                edge = limit - np.linalg.norm(x, axis=-1).reshape(len(x), -1).max(axis=1)
                if certificate.norm == "linf" and x.ndim > 1:
                    edge = edge / math.sqrt(x.shape[-1])
                allowed = np.minimum(allowed, np.maximum(edge, 0.0) + 1e-5 * limit)
        _check(found, allowed, "for random inputs")
    outside = propagation.random_inputs(_BATCH, longest)
    floats = [name for name, x in outside.items() if x.dtype.kind == "f"]
    for name in floats:
        broken = {**outside, name: np.full_like(outside[name], np.nan)}
        _check(served.run(broken, [radius])[0], np.zeros(_BATCH), "for NaN inputs")
        if limit is not None:
            norms = np.linalg.norm(outside[name], axis=-1, keepdims=True)
            far = {**outside, name: outside[name] / np.maximum(norms, 1e-300) * 1.01 * limit}
            _check(served.run(far, [radius])[0], np.zeros(_BATCH), "outside of the ball")
    if any(None in shape[1:] for shape, _ in served.specs.values()):
        longer = propagation.random_inputs(_BATCH, longest + 1)
        _check(served.run(longer, [radius])[0], np.zeros(_BATCH), "for longer inputs")


def _check(found: np.ndarray, allowed: np.ndarray, where: str) -> None:
    above = ~(found <= allowed)
    if above.any():
        worst = int(np.argmax(above))
        require(
            False,
            f"the signature `certified` gives radius {found[worst]:.6g} {where}, the certificate "
            f"allows {allowed[worst]:.6g}",
        )


def attack(propagation: Propagation, logits: str) -> None:
    """Look for two inputs whose outputs differ by more than the total allows, in float64."""
    import tensorflow as tf

    certificate, served = propagation.certificate, propagation.served
    (source,) = propagation.sources
    others = propagation.random_inputs(_BATCH, propagation.lengths[-1])
    others.pop(source, None)
    # An input that is looked up has no part in what follows its lookup, but its mask may have.
    names = sorted(others)
    function = served.differentiable([source, *names], logits)
    given = [
        tf.constant(others[name], tensor.dtype)
        for name, tensor in zip(names, function.inputs[1:], strict=True)
    ]
    rng = np.random.default_rng(2)
    shape = (_BATCH, *propagation.sizes(source)[-1])
    for scale in (0.1, 1.0, 5.0):
        x = propagation.inside(scale * rng.normal(size=shape))
        step = rng.normal(size=shape)
        for _ in range(_ASCENTS):
            sizes = np.maximum(_norm(step, certificate.norm, per_example=True), 1e-300)
            step = 1e-3 * scale * step / sizes
            moved = tf.constant(propagation.inside(x + step))
            with tf.GradientTape() as tape:
                tape.watch(moved)
                after = function(moved, *given)
                before = function(tf.constant(x), *given)
                change = after - before
                aim = tf.reduce_sum(change * tf.stop_gradient(_steepest(change, certificate.norm)))
            distance = _norm(moved.numpy() - x, certificate.norm)
            size = _norm(change.numpy(), certificate.norm)
            # The rounding of float64 and of the difference itself.
            rounding = 1e-12 * (1.0 + np.abs(after.numpy()).max())
            require(
                bool((size <= certificate.total * distance * (1.0 + 1e-6) + rounding).all()),
                "two inputs refute the total: their outputs differ by more",
            )
            gradient = tape.gradient(aim, moved)
            if gradient is None:
                return
            step = _ascent(np.asarray(gradient), certificate.norm)


def _norm(x: np.ndarray, norm: str, *, per_example: bool = False) -> np.ndarray:
    """Norm of each example; with `per_example` of a shape that divides `x`."""
    flat = x.reshape(len(x), -1)
    if norm == "l2":
        sizes = np.linalg.norm(flat, axis=1)
    elif norm == "token":
        sizes = np.linalg.norm(x, axis=-1).reshape(len(x), -1).max(axis=1)
    else:
        sizes = np.abs(flat).max(axis=1)
    return sizes.reshape(-1, *[1] * (x.ndim - 1)) if per_example else sizes


def _steepest(change, norm: str):
    import tensorflow as tf

    if norm != "linf":
        return change
    flat = tf.reshape(change, (change.shape[0], -1))
    largest = tf.one_hot(tf.argmax(tf.abs(flat), axis=1), flat.shape[1], dtype=flat.dtype)
    return tf.reshape(largest * tf.sign(flat), change.shape)


def _ascent(gradient: np.ndarray, norm: str) -> np.ndarray:
    if norm == "linf":
        return np.sign(gradient)
    if norm == "token":
        return gradient / np.maximum(np.linalg.norm(gradient, axis=-1, keepdims=True), 1e-300)
    return gradient
