"""Compares the certificate of a model with lower estimates."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import keras_lipattn
from tools.soundness.generate import Subject

NORMS = ("l2", "token", "linf")
# The attacked model runs in float64. A float32 model runs with folded weights that are rounded to
# float32, a relative error of 6e-8 in each layer; its float64 twin folds the same kernels itself.
TOLERANCE = 1e-6
# A larger Jacobian takes longer than the search without one.
LARGEST_JACOBIAN = 2000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A certificate and a lower estimate, the largest quotient found.

    Args:
        norm: `"l2"`, `"token"` or `"linf"`.
        kind: `"global"`, or `"local"` for a certificate near one input.
        found: lower estimate of the constant.
        certified: total of the certificate, an upper bound.
    """

    norm: str
    kind: str
    found: float
    certified: float

    @property
    def ratio(self) -> float:
        """`found / certified`; 1 when both are 0."""
        if self.found == self.certified:
            return 1.0
        return self.found / self.certified if self.certified else float("inf")

    @property
    def is_violation(self) -> bool:
        """Whether the certificate is wrong; true for NaN."""
        return not self.ratio <= 1.0 + TOLERANCE


def attack(subject: Subject, seed: int = 0) -> list[Comparison]:
    """Comparisons of global and local certificates in each norm with a finite certificate."""
    comparisons = []
    # Condensed, so that caps are computed only once.
    with keras_lipattn.condensed(subject.twin):
        measured = jacobians(subject.twin, subject.points)
    for norm in NORMS:
        certificate = keras_lipattn.certify(
            subject.model, norm=norm, input_radius=subject.input_radius
        )
        if not certificate.is_finite:
            continue
        estimate = _searched(subject, subject.points, norm, seed)
        found = max(estimate.value, *(jacobian_norm(one, norm) for one in measured), 0.0)
        comparisons.append(Comparison(norm, "global", found, certificate.total))
        found, total = _locally(subject, norm, seed, estimate.point)
        comparisons.append(Comparison(norm, "local", found, total))
    return comparisons


def examples_are_independent(subject: Subject) -> bool:
    """Whether the output of every example is the same in a batch and alone."""
    together = np.asarray(subject.twin(subject.points, training=False))
    alone = [np.asarray(subject.twin(one[None], training=False))[0] for one in subject.points]
    scale = 1.0 + np.abs(together).max()
    return bool(np.allclose(together, np.stack(alone), rtol=0.0, atol=1e-9 * scale))


def _locally(subject: Subject, norm: str, seed: int, worst: np.ndarray) -> tuple[float, float]:
    """The lower estimate of a search near one input, and the local certificate there."""
    rng = np.random.default_rng((seed, NORMS.index(norm)))
    # Half of the balls are around the worst point of the global search.
    point = worst if rng.random() < 0.5 else subject.points[0]
    scale = float(np.sqrt(np.mean(np.square(point)))) or 1.0
    radius = scale * 10.0 ** rng.uniform(-3.0, 0.5)
    # Condensed, so that capped weights are known.
    with keras_lipattn.condensed(subject.model):
        certificate = keras_lipattn.certify(
            subject.model, norm=norm, input_radius=subject.input_radius, center=point, radius=radius
        )
    estimate = _searched(subject, point[None], norm, seed, radius=radius)
    return estimate.value, certificate.total


def _searched(subject: Subject, points: np.ndarray, norm: str, seed: int, **options):
    kinds = [type(layer).__name__ for layer in subject.twin.layers]
    deep = sum("Attention" in kind for kind in kinds) > 1
    with keras_lipattn.condensed(subject.twin):
        return keras_lipattn.estimate_lipschitz(
            subject.twin,
            points,
            norm,
            # With several attention layers a short ascent ends far below the maximum.
            steps=40 if deep else 12,
            restarts=2,
            input_radius=subject.input_radius,
            seed=seed,
            **options,
        )


def jacobians(model: keras.Model, points: np.ndarray) -> np.ndarray:
    """Jacobians at the points, `(points, outputs, inputs)`; none if they are too large."""
    outputs = int(np.prod(model.output_shape[1:]))
    size = int(np.prod(points.shape[1:]))
    if outputs * size > LARGEST_JACOBIAN:
        return np.empty((0, outputs, size))
    # With one copy of a point for every output, one backward pass gives all rows.
    copies = tf.constant(np.repeat(points, outputs, axis=0))
    picked = np.tile(np.eye(outputs), (len(points), 1))
    with tf.GradientTape() as tape:
        tape.watch(copies)
        value = tf.reshape(model(copies, training=False), picked.shape)
        total = tf.reduce_sum(value * picked)
    zero = tf.UnconnectedGradients.ZERO
    rows = np.asarray(tape.gradient(total, copies, unconnected_gradients=zero))
    return rows.reshape(len(points), outputs, size)


def jacobian_norm(jacobian: np.ndarray, norm: str) -> float:
    """Norm of a Jacobian; 0 in the token norm, which only the search covers."""
    if norm == "l2":
        return float(np.linalg.norm(jacobian, 2))
    return float(np.abs(jacobian).sum(axis=1).max()) if norm == "linf" else 0.0
