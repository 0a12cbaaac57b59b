"""Compares the certificate of a subject with lower estimates and other measurements."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

import keras_lipattn
from keras_lipattn.certification.keras_models import augments
from tools.soundness.rules.interpolation import interpolation_in_float64
from tools.soundness.rules.norms import Geometry
from tools.soundness.rules.subjects import BATCH, Illegal, RuleSubject, first_line

NORMS = ("l2", "token", "linf")
# Steps of the ascent on the norm of the Jacobian.
STEPS = 5
# Largest number of entries of the Jacobians of a round.
LARGEST = 40_000
# Step sizes of difference quotients that confirm a gradient.
_STEPS_64, _STEPS_32 = (1e-3, 1e-5, 1e-6), (1e-1, 1e-2)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A certified constant and the largest value found for it.

    Args:
        norm: `"l2"`, `"token"` or `"linf"`.
        kind: `"jacobian"`, `"quotient"`, `"shorter"` or `"pair"`.
        found: a lower estimate.
        certified: the certified number.
        tolerance: relative tolerance.
    """

    norm: str
    kind: str
    found: float
    certified: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """`found / certified`; 1 when both are 0."""
        if self.found <= 1e-9 and self.certified <= 1e-9:
            return 1.0
        return self.found / self.certified if self.certified else float("inf")

    @property
    def is_violation(self) -> bool:
        return not self.ratio <= 1.0 + self.tolerance

    def __str__(self) -> str:
        return f"{self.kind} {self.norm}: found {self.found:.6g} > certified {self.certified:.6g}"


@dataclasses.dataclass
class Outcome:
    """The result of one attack.

    Args:
        comparisons: certified constants with lower estimates.
        faults: messages about other errors: crashes, and examples that depend on each other.
        refusals: reasons for constants that are not finite, by norm.
    """

    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        worst: dict[str, Comparison] = {}
        for one in self.comparisons:
            if one.is_violation and not (one.kind in worst and worst[one.kind].ratio >= one.ratio):
                worst[one.kind] = one
        return [*self.faults, *map(str, worst.values())]


def attack(subject: RuleSubject, seed: int = 0) -> Outcome:
    """Certifies the subject in every norm and tries to refute each finite certificate.

    Raises:
        Illegal: if the model does not run.
    """
    outcome = Outcome()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        attempt = _Attack(subject, outcome, np.random.default_rng(seed))
        attempt.require_running()
        if _certify(subject, attempt):
            with interpolation_in_float64():
                attempt.run()
    return outcome


def _certify(subject: RuleSubject, attempt: "_Attack") -> bool:
    """Whether there is a finite certificate to attack."""
    outcome = attempt.outcome
    for norm in NORMS:
        try:
            certificate = keras_lipattn.certify(subject.model, norm=norm, **subject.options)
        except Exception as error:
            outcome.faults.append(f"certify crashes: {first_line(error)}")
            return False
        if certificate.is_finite:
            attempt.finite[norm] = certificate
            attempt.head = certificate.head
            continue
        reasons = [row.reason for row in certificate.rows if row.reason]
        outcome.refusals[norm] = reasons[0] if reasons else ""
    return bool(attempt.finite)


class _Attack:
    def __init__(self, subject: RuleSubject, outcome: Outcome, rng):
        self.subject = subject
        self.finite: dict[str, Any] = {}
        self.outcome = outcome
        self.rng = rng
        self.radius = subject.options.get("input_radius")
        self.head = ""
        self.geometry: Any = None
        # Whether derivatives are computed by differences.
        self.differs = False
        self.tolerance = subject.tolerance
        self.single = subject.tolerance > 1e-5
        self.dtype = "float32" if self.single else "float64"
        self.shapes = [source.shape for source in subject.sources]
        # Length of the sequences if it differs from that of the sources.
        self.length: int | None = None

    def require_running(self) -> None:
        try:
            self.outputs(self.inside(self.subject.points)[:BATCH], np.arange(BATCH))
        except Exception as error:
            raise Illegal(f"{self.subject.text}: {first_line(error)}") from error

    def run(self) -> None:
        subject = self.subject
        points = self.inside(subject.points)
        examples = np.arange(len(points))
        outputs = self.outputs(points[:BATCH], examples[:BATCH])
        if not self.independent(points, outputs):
            return
        shapes = [array.shape[1:] for array in outputs]
        if sum(int(np.prod(shape)) for shape in shapes) == 0:
            return
        shifted = self.head == "softmax"
        self.geometry = Geometry(self.shapes, shapes, up_to_shift=shifted)
        values = np.concatenate([array.reshape(BATCH, -1) for array in outputs], axis=1)
        if not np.isfinite(values).all():
            points, examples = points[:1], examples[:1]
            if not np.isfinite(values[0]).all():
                self.fault("the output is not finite, with a certificate")
                return
        self.compare(points, examples, "jacobian")
        exactly = any(one.threat_model.shapes for one in self.finite.values())
        if subject.shortens and not exactly:
            self.shorter()

    # Values -----------------------------------------------------------------------------------

    def inside(self, points: np.ndarray) -> np.ndarray:
        """The points, with tokens scaled into the ball of the certificate."""
        if self.radius is None:
            return points
        parts = []
        for _source, values in zip(self.subject.sources, self.split(points), strict=True):
            sizes = np.linalg.norm(values, axis=-1, keepdims=True)
            values = values * np.minimum(1.0, self.radius / np.maximum(sizes, 1e-300))
            parts.append(values.reshape(len(points), -1))
        return np.concatenate(parts, axis=1)

    def split(self, points):
        parts, start = [], 0
        for shape in self.shapes:
            size = int(np.prod(shape))
            parts.append(points[:, start : start + size].reshape(-1, *shape))
            start += size
        return parts

    def call(self, points, examples) -> list[Any]:
        """Outputs of the model; `points` may be a tensor to differentiate by."""
        outputs = self.subject.run(points, examples, length=self.length)
        return [self.revealed(one) for one in outputs]

    def revealed(self, output):
        """The certified output: without a softmax or sigmoid at the end."""
        if self.head == "softmax":
            logs = tf.math.log(output)
            return logs - tf.reduce_mean(logs, axis=-1, keepdims=True)
        if self.head == "sigmoid":
            return tf.math.log(output) - tf.math.log1p(-output)
        return output

    def outputs(self, points, examples) -> list[np.ndarray]:
        return [np.asarray(one) for one in self.call(tf.constant(points, self.dtype), examples)]

    def flat(self, points, examples) -> np.ndarray:
        arrays = self.outputs(points, examples)
        return np.concatenate([array.reshape(len(points), -1) for array in arrays], axis=1)

    # Independence of examples -------------------------------------------------------------------

    def independent(self, points, outputs) -> bool:
        """Checks that outputs do not depend on other examples or on `training`."""
        examples = np.arange(BATCH)
        sizes = {array.shape[0] if array.ndim else None for array in outputs}
        if sizes != {BATCH}:
            self.fault(f"batch of {BATCH} in, {sizes} out, with a certificate")
            return False
        moved = points[:BATCH].copy()
        moved[1] = self.inside(2.0 * moved[1:2] + 1.0)[0]
        if self.subject.masked:
            moved[1] *= points[1] != 0.0
        after = self.outputs(moved, examples)
        for old, new in zip(outputs, after, strict=True):
            if not _close(old[[0, 2]], new[[0, 2]], self.subject.tolerance):
                self.fault("one example changes the output of another, with a certificate")
                return False
        # In Keras, augmentation layers draw random numbers unless `training` is false.
        if not any(augments(layer) for layer in self.subject.model._flatten_layers()):
            bare = self.subject.run(
                tf.constant(points[:BATCH], self.dtype), examples, training=None
            )
            for old, new in zip(outputs, bare, strict=True):
                if not _close(old, np.asarray(self.revealed(new)), self.subject.tolerance):
                    self.fault("a call without `training` gives another output, with a certificate")
                    return False
        for size in (1, len(points)):
            if not self.agrees(points[:size], outputs):
                return False
        return True

    def agrees(self, points, outputs) -> bool:
        """Checks that another batch size gives the same outputs."""
        size = len(points)
        try:
            others = self.outputs(points, np.arange(size))
        except Exception as error:
            self.fault(f"a batch of {size} fails, with a certificate: {first_line(error)}")
            return False
        for old, new in zip(outputs, others, strict=True):
            if len(new) != size:
                self.fault(f"batch of {size} in, {len(new)} out, with a certificate")
                return False
            shared = min(size, BATCH)
            if not _close(old[:shared], new[:shared], self.subject.tolerance):
                self.fault(f"a batch of {size} gives another output, with a certificate")
                return False
        return True

    def fault(self, sentence: str) -> None:
        self.outcome.faults.append(sentence)

    # Constants ----------------------------------------------------------------------------------

    def jacobians(self, points, examples) -> np.ndarray:
        """`(points, outputs, inputs)`, by differences where an operation has no derivative."""
        if not self.differs:
            try:
                return self.derivatives(points, examples)
            except LookupError:
                self.differs = True
                self.tolerance = max(self.tolerance, 1e-4)
        h = 1e-5
        steps = np.concatenate([h * np.eye(points.shape[1]), -h * np.eye(points.shape[1])])
        moved = (points[:, None] + steps).reshape(-1, points.shape[1])
        values = self.flat(moved, np.repeat(examples, len(steps)))
        values = values.reshape(len(points), 2, points.shape[1], -1)
        return (values[:, 0] - values[:, 1]).swapaxes(1, 2) / (2.0 * h)

    def derivatives(self, points, examples) -> np.ndarray:
        """Jacobians by one backward pass, with a copy of a point for every output."""
        outputs = self.geometry.outputs
        copies = tf.constant(np.repeat(points, outputs, axis=0), self.dtype)
        picked = np.tile(np.eye(outputs), (len(points), 1)).astype(self.dtype)
        with tf.GradientTape() as tape:
            tape.watch(copies)
            arrays = self.call(copies, np.repeat(examples, outputs))
            value = tf.concat([tf.reshape(one, (len(picked), -1)) for one in arrays], axis=1)
            # Zero times infinity is NaN.
            total = tf.reduce_sum(tf.where(picked > 0, value, 0.0))
        zero = tf.UnconnectedGradients.ZERO
        rows = np.asarray(tape.gradient(total, copies, unconnected_gradients=zero), np.float64)
        return rows.reshape(len(points), outputs, -1)

    def compare(self, points, examples, kind: str) -> None:
        geometry = self.geometry
        most = max(1, LARGEST // max(1, geometry.outputs * geometry.inputs))
        points, examples = points[:most], examples[:most]
        found = dict.fromkeys(self.finite, 0.0)
        best = {}
        jacobians = self.jacobians(points, examples)
        for norm in self.finite:
            measured = [geometry.attained(one, norm) for one in jacobians]
            worst = max(range(len(measured)), key=lambda one: measured[one][0])
            found[norm] = measured[worst][0]
            best[norm] = (points[worst], examples[worst], *measured[worst][1:])
        self.pairwise_constants(jacobians, points, examples)
        for step in range(STEPS if kind == "jacobian" else 2):
            self.climb(found, best, step)
        for norm, certificate in self.finite.items():
            value = found[norm]
            if Comparison(norm, kind, value, certificate.total, self.tolerance).is_violation:
                # At ties, gradients of maxima are not directional derivatives.
                value = min(value, self.confirmed(best[norm], norm))
            self.add(norm, kind, value, certificate.total)
        self.quotients(points, examples, best, kind)

    def confirmed(self, best, norm: str, covector=None) -> float:
        """The largest difference quotient at a point in a direction."""
        point, example, _, direction = best
        steps = _STEPS_32 if self.single else _STEPS_64
        scale = np.linalg.norm(direction) + 1e-300
        ends = np.stack([point + sign * h / scale * direction for h in steps for sign in (1, -1)])
        outputs = self.flat(ends, np.full(len(ends), example))
        change = outputs[::2] - outputs[1::2]
        if covector is None:
            moved = self.geometry.sizes(change, norm, "outputs")
        else:
            moved = np.abs(change @ covector)
        sizes = self.geometry.sizes(ends[::2] - ends[1::2], norm, "inputs")
        return float(np.max(moved / np.maximum(sizes, 1e-300)))

    def climb(self, found, best, step) -> None:
        """An ascent step from the best point of each norm."""
        if self.differs:
            return
        norms = list(best)
        points = np.stack([best[norm][0] for norm in norms])
        examples = np.array([best[norm][1] for norm in norms])
        covectors = np.stack([best[norm][2] for norm in norms])
        directions = np.stack([best[norm][3] for norm in norms])
        h = 1e-2 if self.single else 1e-5
        ends = tf.constant(
            np.concatenate([points + h * directions, points - h * directions]), self.dtype
        )
        with tf.GradientTape() as tape:
            tape.watch(ends)
            arrays = self.call(ends, np.tile(examples, 2))
            value = tf.concat([tf.reshape(one, (2 * len(norms), -1)) for one in arrays], axis=1)
            total = tf.reduce_sum(value * np.tile(covectors, (2, 1)).astype(self.dtype))
        zero = tf.UnconnectedGradients.ZERO
        gradient = np.asarray(tape.gradient(total, ends, unconnected_gradients=zero), np.float64)
        gradient = gradient[: len(norms)] - gradient[len(norms) :]
        sizes = np.abs(gradient).max(axis=1, keepdims=True)
        if not np.isfinite(sizes).all():
            return
        scale = np.maximum(np.sqrt(np.mean(points**2, axis=1, keepdims=True)), 1e-3)
        rate = 0.5 * scale / (1.0 + step)
        moved = points + rate * gradient / np.where(sizes > 0.0, sizes, 1.0)
        if self.subject.masked:
            moved = np.where(points == 0.0, 0.0, moved)
        moved = self.inside(moved)
        for norm, point, example, jacobian in zip(
            norms, moved, examples, self.jacobians(moved, examples), strict=True
        ):
            value, covector, direction = self.geometry.attained(jacobian, norm)
            if value > found[norm]:
                found[norm] = value
                best[norm] = (point, example, covector, direction)

    def quotients(self, points, examples, best, kind) -> None:
        """Difference quotients for changes of finite size."""
        starts, ends, which = [], [], []
        for norm in best:
            point, example, _, direction = best[norm]
            scale = np.linalg.norm(point) + 0.1
            for size in (0.03, 0.3, 3.0, -1.0):
                starts.append(point)
                ends.append(point + size * scale * direction / (np.linalg.norm(direction) + 1e-300))
                which.append(example)
        for point, example in zip(points, examples, strict=True):
            starts.append(point)
            ends.append(point + 10.0 ** self.rng.uniform(-2, 1) * self.rng.normal(size=point.shape))
            which.append(example)
        begin, end = np.stack(starts), self.inside(np.stack(ends))
        if self.subject.masked:
            end = np.where(begin == 0.0, 0.0, end)
        outputs = self.flat(np.concatenate([begin, end]), np.tile(which, 2))
        change = outputs[len(begin) :] - outputs[: len(begin)]
        for norm, certificate in self.finite.items():
            sizes = self.geometry.sizes(end - begin, norm, "inputs")
            moved = self.geometry.sizes(change, norm, "outputs")
            # Changes much smaller than the values are dominated by rounding.
            rounding = 1e-3 if self.single else 1e-12
            floor = rounding * (1.0 + np.abs(outputs).max(initial=0.0, where=np.isfinite(outputs)))
            usable = np.isfinite(moved) & (sizes > 1e-9)
            ratios = np.maximum(moved - floor, 0.0)[usable] / sizes[usable]
            label = "quotient" if kind == "jacobian" else kind
            self.add(norm, label, float(ratios.max(initial=0.0)), certificate.total)

    def pairwise_constants(self, jacobians, points, examples) -> None:
        """The pairwise constants."""
        for norm, certificate in self.finite.items():
            if (
                not certificate.pairwise_constants
                or len(certificate.pairwise_constants) != self.geometry.outputs
            ):
                continue
            for i in range(self.geometry.outputs):
                for j in range(i):
                    rows = jacobians[:, i] - jacobians[:, j]
                    found = [self.geometry.dual(row, norm) for row in rows]
                    worst = max(range(len(found)), key=lambda one: found[one][0])
                    value, certified = found[worst][0], certificate.pairwise_constants[i][j]
                    if Comparison(norm, "pair", value, certified, self.tolerance).is_violation:
                        covector = np.zeros(self.geometry.outputs)
                        covector[[i, j]] = 1.0, -1.0
                        place = (points[worst], examples[worst], None, found[worst][1])
                        value = min(value, self.confirmed(place, norm, covector))
                    self.add(norm, "pair", value, certified)

    def add(self, norm, kind, found, certified) -> None:
        comparison = Comparison(norm, kind, float(found), certified, self.tolerance)
        self.outcome.comparisons.append(comparison)

    # Shorter sequences --------------------------------------------------------------------------

    def shorter(self) -> None:
        """Sequences shorter than the certified length."""
        subject, full = self.subject, self.shapes
        length = subject.options["sequence_length"]
        if length < 2 or any(shape[0] != length for shape in full):
            return
        parts = [part[:, : length - 1] for part in self.split(self.inside(subject.points))]
        self.length = length - 1
        self.shapes = [(length - 1, *shape[1:]) for shape in full]
        points = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
        try:
            try:
                outputs = self.outputs(points[:1], np.arange(1))
            except Exception:
                # The model takes only one length.
                return
            shapes = [array.shape[1:] for array in outputs]
            self.geometry = Geometry(self.shapes, shapes, up_to_shift=self.head == "softmax")
            if self.geometry.outputs and np.isfinite(outputs[0]).all():
                self.compare(points, np.arange(len(points)), "shorter")
        finally:
            self.shapes, self.length = full, None


def range_fault(values, center, radius: float, largest: float) -> str:
    """A message if tokens are outside a certified range, else an empty string.

    Args:
        values: actual values of a tensor, `(..., width)`.
        center: claimed center of the tokens, that broadcasts to `values`.
        radius: claimed largest distance of a token to the center.
        largest: claimed largest absolute value of an entry.
    """
    distance = float(np.linalg.norm(values - center, axis=-1).max(initial=0.0))
    if distance > radius * (1.0 + 1e-6) + 1e-9:
        return f"a token is {distance:.6g} from the center, claimed {radius:.6g}"
    entry = float(np.abs(values).max(initial=0.0))
    if entry > largest * (1.0 + 1e-6) + 1e-9:
        return f"an entry is {entry:.6g}, claimed {largest:.6g}"
    return ""


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    bound = 1e-10 if tolerance < 1e-5 else 1e-5
    scale = 1.0 + np.abs(a).max(initial=0.0, where=np.isfinite(a))
    return bool(np.allclose(a, b, rtol=0.0, atol=bound * scale, equal_nan=True))
