"""Certified accuracy over a range of radii, with the accuracy under a real attack."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn._arguments import require_nonnegative
from keras_lipattn._figures import save
from keras_lipattn._plots import accuracy_figure
from keras_lipattn.certification import Certificate, certified_radius, certify
from keras_lipattn.certification.classifier_head import logits_of
from keras_lipattn.certification.coverage import are_covered
from keras_lipattn.layers import condensed, lipschitz_layers

# Arguments of `certify` that `certified_accuracy` passes on.
_OPTIONS = {"sequence_length", "input_radius", "assume_fixed_mask", "mask", "inputs", "check"}
_TEXTS = {"l2": "2-norm", "token": "token norm", "linf": "max norm"}


@dataclasses.dataclass(frozen=True, eq=False)
class RobustAccuracy:
    """Clean and certified accuracy, and accuracy under attack. Made by `certified_accuracy`.

    Attributes:
        norm: Norm of the radii: `"l2"`, `"token"` or `"linf"`.
        constant: Certified Lipschitz constant of the model.
        radii: The radii of the table.
        correct: Whether each example is classified correctly, shape `(examples,)`.
        certified_radii: Certified radius of each example, 0 where it is classified wrongly.
        broken_at: Smallest of `radii` at which the attack changed the class of each example, 0
            where the class was wrong from the start and `inf` where it never changed. `None`
            without an attack.
        sample_weight: Weight of each example in the shares, `None` for equal weights.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.eye(2)])
    >>> x, y = np.array([[1.0, 0.0], [0.0, 0.2], [1.0, 0.0]]), np.array([0, 1, 1])
    >>> accuracy = keras_lipattn.certified_accuracy(model, x, y, radii=[0.5])
    >>> round(accuracy.clean, 2), round(accuracy.certified(0.5), 2)
    (0.67, 0.33)
    >>> accuracy.certified_radii.round(2)
    array([0.71, 0.14, 0.  ])
    """

    norm: str
    constant: float
    radii: tuple[float, ...]
    correct: np.ndarray
    certified_radii: np.ndarray
    broken_at: np.ndarray | None
    sample_weight: np.ndarray | None = None

    def _mean(self, values: np.ndarray) -> float:
        if self.sample_weight is None:
            return float(values.mean())
        counts = self.sample_weight > 0.0
        return float(np.average(values[counts], weights=self.sample_weight[counts]))

    @property
    def clean(self) -> float:
        """Accuracy on the examples as they are."""
        return self._mean(self.correct)

    def certified(self, radius: float) -> float:
        """Share of examples that are correct, and provably stay so within `radius`."""
        return self._mean(self.correct & (self.certified_radii > radius))

    def attacked(self, radius: float) -> float:
        """Share of examples that are correct, and stayed so under attacks up to `radius`.

        Raises:
            ValueError: If there was no attack.
        """
        if self.broken_at is None:
            raise ValueError("There was no attack. Pass `attack=` to `certified_accuracy`")
        return self._mean(self.broken_at > radius)

    @property
    def average_radius(self) -> float:
        """Mean certified radius over all examples, where an error counts as 0.

        `inf` if a radius is.
        """
        return self._mean(self.certified_radii)

    @property
    def contradictions(self) -> int:
        """Number of examples whose class the attack changed within their certified radius.

        Anything but 0 means a wrong certificate or rounding errors as large as a margin.
        """
        if self.broken_at is None:
            return 0
        return int((self.correct & (self.broken_at < self.certified_radii)).sum())

    def table(self) -> str:
        """The accuracies as a Markdown table."""
        rows = [("radius", "certified"), ("---", "---"), ("0", f"{self.clean:.4f}")]
        rows += [(f"{radius:g}", f"{self.certified(radius):.4f}") for radius in self.radii]
        if self.broken_at is not None:
            under = [self.clean, *map(self.attacked, self.radii)]
            more = ["under attack", "---", *(f"{share:.4f}" for share in under)]
            rows = [(*row, text) for row, text in zip(rows, more, strict=True)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def __str__(self) -> str:
        weights = self.sample_weight
        counted = len(self.correct) if weights is None else np.count_nonzero(weights)
        lines = [
            f"{counted} examples, radii in the {_TEXTS[self.norm]}, certified constant "
            f"{self.constant:.4g}, average certified radius {self.average_radius:.4g}",
            self.table(),
        ]
        if math.isinf(self.constant):
            lines.append("The constant is inf: `certify(model).reasons` says why.")
        if self.contradictions:
            lines.append(
                f"The attack changed the class of {self.contradictions} examples within their "
                "certified radius: do not trust this certificate."
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Save a chart of the certified accuracy over the radius, and of that under attack.

        Args:
            path: File to write; its ending determines the format.

        Raises:
            ImportError: If matplotlib is not installed.
            OSError: If the file cannot be written; an existing file is kept.
        """
        finite = self.certified_radii[np.isfinite(self.certified_radii)]
        attacked = None if self.broken_at is None else [*map(self.attacked, self.radii)]
        figure = accuracy_figure(
            norm=_TEXTS[self.norm],
            end=max([*self.radii, *finite.tolist(), 1e-12]),
            certified=self.certified,
            clean=self.clean,
            radii=self.radii,
            attacked=attacked,
        )
        save(figure, path)


def certified_accuracy(
    model: keras.Model,
    x: Any,
    y: Any,
    radii: Sequence[float],
    norm: str = "l2",
    *,
    local: bool = False,
    certificate: Certificate | None = None,
    attack: Any = None,
    bounds: tuple[float, float] | None = None,
    batch_size: int = 256,
    sample_weight: Any = None,
    **options: Any,
) -> RobustAccuracy:
    """Clean accuracy, certified accuracy at several radii, and accuracy under attack.

    Args:
        model: A built classifier: one vector of two or more logits or of probabilities an example,
            or logits of every token. In the latter case every token counts as an example, so pass
            the mask of padded tokens as `sample_weight`; `local` and `attack` are not available.
        x: Examples, as for `model.predict`. With `attack`, an array of floating-point numbers, or a
            list or dictionary with one such array. It is attacked; integers and booleans, such as
            masks, stay as they are.
        y: Integer classes, `(examples,)` or `(examples, 1)`, or `(examples, tokens)`.
        radii: Radii to report, in units of the model's input.
        norm: Norm of the radii: `"l2"`, `"token"` or `"linf"`, see `certify`.
        local: Whether to certify every example by itself with `certified_radius`: larger radii,
            and some ten certificates an example.
        certificate: A certificate of these weights; made with `certify` by default. Examples that
            it does not cover, for instance outside of its `input_radius` or longer than its
            `sequence_length`, have the radius 0.
        attack: `True` for 40 steps of projected gradient descent, started three times, and for
            `"l2"` the attack of Rony et al. 2019 as well; or an attack of foolbox, or a list of
            them, for the norm of the radii. `None` for no attack.
        bounds: Smallest and largest entry of an input that the attack may use. By default those of
            the attacked array.
        batch_size: Examples in one step of the computation.
        sample_weight: Weights of the examples or tokens in all shares, of the shape of `y`. A
            boolean mask counts where it is true.
        **options: Further arguments of `certify`, such as `input_radius=2.0`.

    Returns:
        `RobustAccuracy`. Its numbers are for real arithmetic: rounding errors of the logits are
        not subtracted from the margins.

    Raises:
        ValueError: If the model is not such a classifier, the certificate is not for these weights
            or this norm, sizes differ, or an argument is out of range.
        TypeError: If an argument is unknown.
        ImportError: If `attack` is given and foolbox is not installed.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    >>> y = (x[:, 0] > 0).astype(int)
    >>> model = keras.Sequential([keras.Input((4,)), keras_lipattn.SpectralDense(2)])
    >>> model.compile("adam", keras_lipattn.losses.MarginCrossentropy(radius=0.1))
    >>> history = model.fit(x, y, epochs=2, verbose=0)
    >>> accuracy = keras_lipattn.certified_accuracy(model, x, y, radii=[0.1, 0.5])
    >>> accuracy.clean >= accuracy.certified(0.1) >= accuracy.certified(0.5)
    True

    Reference:
        Rauber et al., "Foolbox: a Python toolbox to benchmark the robustness of machine learning
        models", 2017.
    """
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(
            f"`certified_accuracy` takes the arguments {sorted(_OPTIONS)} of `certify`, and those "
            f"of its own. Received: {', '.join(unknown)}"
        )
    radii = tuple(float(radius) for radius in radii)
    for radius in radii:
        require_nonnegative("radii", radius)
    if list(radii) != sorted(set(radii)):
        raise ValueError(f"`radii` must be in ascending order. Received: radii={list(radii)}")
    if attack is not None and norm == "token":
        raise ValueError("No attack of foolbox is for the token norm. Received: norm='token'")
    if not all(np.shape(leaf)[0] for leaf in keras.tree.flatten(x) if hasattr(leaf, "shape")):
        raise ValueError("`x` must hold at least one example. Received: an empty array")
    if certificate is None:
        certificate = certify(model, norm, **options)
    if certificate.norm != norm or not certificate.matches(model):
        raise ValueError(
            f"`certificate` must be for these weights and the norm {norm!r}. Received: a "
            f"certificate in the norm {certificate.norm!r}"
            f"{'' if certificate.matches(model) else ' of other weights'}"
        )
    if certificate.threat_model.center:
        raise ValueError(
            "`certificate` must be global; pass `local=True` for local certificates. Received: a "
            f"certificate for inputs within {certificate.threat_model.radius:g} of a center"
        )
    if certificate.head not in ("logits", "softmax", "token logits"):
        raise ValueError(
            "The model must end in one vector of two or more logits or probabilities an example, "
            "or of logits a token without a softmax. Received: a model whose head is "
            f"{certificate.head!r}"
        )
    if certificate.head == "token logits" and (local or attack is not None):
        raise ValueError(
            "`local` and `attack` must be left out for a model with logits of every token. "
            f"Received: local={local}, attack={attack}"
        )
    logits = logits_of(model.predict(x, batch_size=batch_size, verbose=0), certificate.head)
    covered = _covered(certificate, model, x, len(logits))
    covered = np.repeat(covered, math.prod(logits.shape[1:-1]))
    logits = logits.reshape(-1, logits.shape[-1])
    classes = np.asarray(y)
    if classes.size != len(logits) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(
            f"`y` must hold the integer class of each of the {len(logits)} examples or tokens. "
            f"Received: shape={classes.shape}, dtype={classes.dtype}"
        )
    classes = classes.reshape(len(logits))
    weights = None if sample_weight is None else _weights(sample_weight, len(logits))
    correct = (logits.argmax(axis=-1) == classes) & np.isfinite(logits).all(axis=-1)
    found = certified_radius(model, x, norm, **options) if local else 0.0
    found = np.maximum(found, np.where(covered, certificate.certified_radius(logits), 0.0))
    broken_at = None
    if attack is not None:
        broken_at = np.where(correct, math.inf, 0.0)
        _attack(model, x, classes, broken_at, radii, norm, attack, bounds, batch_size)
    return RobustAccuracy(
        norm=norm,
        constant=certificate.total,
        radii=radii,
        correct=correct,
        certified_radii=np.where(correct, found, 0.0),
        broken_at=broken_at,
        sample_weight=weights,
    )


def _weights(sample_weight: Any, count: int) -> np.ndarray:
    weights = np.asarray(sample_weight, np.float64)
    if weights.size != count or not (weights >= 0.0).all() or not 0.0 < weights.sum() < math.inf:
        raise ValueError(
            f"`sample_weight` must hold a weight for each of the {count} examples or tokens, none "
            f"of them negative and not all 0. Received: shape={weights.shape}"
        )
    return weights.reshape(count)


def _covered(certificate: Certificate, model: keras.Model, x: Any, count: int) -> np.ndarray:
    """Whether the certificate is about each of the examples."""
    threat = certificate.threat_model
    if math.isinf(threat.input_radius) and not threat.shapes and threat.max_tokens is None:
        return np.ones(count, bool)
    if not all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x)):
        raise ValueError(
            "`x` must consist of arrays where a certificate does not cover all inputs. Received: "
            f"x of type {type(x).__name__}"
        )
    return keras.ops.convert_to_numpy(are_covered(certificate, model, x))


def _attack(model, x, classes, broken_at, radii, norm, attack, bounds, batch_size) -> None:
    """Lower `broken_at` to the smallest radius at which an attack changes each class."""
    try:
        import foolbox
        from foolbox.models.tensorflow import TensorFlowModel
    except ImportError as error:
        raise ImportError("Attacks need foolbox: pip install keras_lipattn[attacks]") from error
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Attacks run on the TensorFlow backend. Received: backend={keras.backend.backend()!r}"
        )
    import tensorflow as tf

    attacked, fixed, inputs = _attacked_array(x)
    if bounds is None:
        bounds = (float(attacked.min()), float(attacked.max()))
    if attack is True:
        attack = _default_attacks(foolbox.attacks, norm)
    attacks = attack if isinstance(attack, (list, tuple)) else [attack]

    @tf.function(reduce_retracing=True)
    def compiled(array, others):
        return model(inputs(array, others), training=False)

    # The weights do not change, so nothing is computed from them again in the steps of an attack.
    within = any(layer.is_condensed for layer in lipschitz_layers(model))
    with contextlib.nullcontext() if within else condensed(model):
        for one in attacks:
            # A search for the smallest change serves all radii at once.
            smallest = isinstance(one, foolbox.attacks.base.MinimizationAttack)
            for group in [list(radii)] if smallest else [[radius] for radius in radii]:
                rows = np.flatnonzero(broken_at > group[0])
                for start in range(0, len(rows), batch_size):
                    batch = rows[start : start + batch_size]
                    others = [tf.constant(array[batch]) for array in fixed]
                    victim = TensorFlowModel(
                        functools.partial(compiled, others=others), bounds=bounds, device="cpu:0"
                    )
                    arguments = tf.constant(attacked[batch]), tf.constant(classes[batch], tf.int64)
                    _, _, success = one(victim, *arguments, epsilons=group)
                    for radius, broken in zip(group, np.asarray(success), strict=True):
                        reached = np.where(broken, radius, math.inf)
                        broken_at[batch] = np.minimum(broken_at[batch], reached)


def _attacked_array(x) -> tuple[np.ndarray, list[np.ndarray], Any]:
    """The floating-point array of the inputs, the other ones, and what puts them together."""
    arrays = [np.asarray(part) for part in keras.tree.flatten(x)]
    places = [i for i, part in enumerate(arrays) if np.issubdtype(part.dtype, np.floating)]
    if len(places) != 1:
        kinds = sorted({part.dtype.name for part in arrays})
        raise ValueError(
            "With `attack`, `x` must hold exactly one array of floating-point numbers. "
            f"Received: {len(arrays)} arrays with the dtypes {kinds}"
        )
    (place,) = places
    attacked = arrays.pop(place).astype(keras.backend.floatx())

    def inputs(array, others):
        return keras.tree.pack_sequence_as(x, [*others[:place], array, *others[place:]])

    return attacked, arrays, inputs


def _default_attacks(attacks, norm: str) -> list[Any]:
    if norm == "linf":
        return [attacks.LinfProjectedGradientDescentAttack(steps=40).repeat(3)]
    # The search for the smallest change comes first: what it breaks is not attacked again.
    return [
        attacks.DDNAttack(steps=100),
        attacks.L2ProjectedGradientDescentAttack(steps=40).repeat(3),
    ]
