"""The certificate of a model: a value that can be printed, kept and compared."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_lipattn._figures import save
from keras_lipattn.certification.certificate_content import (
    check_values,
    decode,
    encode,
    hash_of_content,
    parse,
)
from keras_lipattn.certification.fingerprint import fingerprint_of
from keras_lipattn.certification.reasons import REPLACEMENTS
from keras_lipattn.certification.threat_model import ThreatModel
from keras_lipattn.linalg import SAFETY

SCHEMA = 2
# Above this total a margin of 1 between logits certifies a radius below 1e-3 / sqrt(2), less
# than a fifth of one gray level of an image in [0, 1].
VACUOUS_ABOVE = 1e3
_MOST_PROPOSALS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificateRow:
    """The bound of one call of a layer.

    Args:
        path: names of the models and layers that contain the call, and of the layer, joined by "/";
            unique in the certificate. The second call of a layer gets ":call2", and so on. Of two
            layers with the same name in a subclassed model, the second gets "#2".
        layer: class of the layer, or of the node of `keras.ops`.
        constant: Lipschitz constant of the call alone, in the norm of the certificate, with
            respect to all its inputs together.
        published: the constant by the earlier published bound, where there is one.
        radius: radius of a ball that holds the tokens of its input, `inf` if none is known.
        tokens: largest number of tokens of its input, `None` if it is not known.
        theorem: where the constant comes from.
        reason: why it is `inf` and what to do, in one line.
        replacement: for a row that is `inf`, what to use in place of the layer, if that helps.
        exact: whether the constant is attained or approached by the call alone.
        cost: the part of the call in the natural logarithm of the total; the costs of all rows sum
            to it. The costs of the branches of a sum are weighted by their shares in the sum.
        explained_by: for a row that is `inf` only because of another row, the path of that row.

    Example:

    >>> logits = keras_lipattn.SpectralDense(3, name="logits")
    >>> model = keras.Sequential([keras.Input((4,)), logits])
    >>> row = keras_lipattn.certify(model).row("logits")
    >>> row.layer, row.constant <= 1.0, row.theorem
    ('SpectralDense', True, 'spectral norm')
    """

    path: str
    layer: str
    constant: float
    published: float
    radius: float = math.inf
    tokens: int | None = None
    theorem: str = ""
    reason: str = ""
    replacement: str = ""
    exact: bool = False
    cost: float = 0.0
    explained_by: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether the constant is finite."""
        return math.isfinite(self.constant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """A proven Lipschitz constant of a model, with its assumptions and its parts.

    Args:
        model: name of the model.
        total: Lipschitz constant of the model, an upper bound; `inf` when none is known.
        log10: its decimal logarithm, finite even where the total is too large for a float.
        published_total: the total with the earlier published bound for every attention layer;
            `inf` where there is none.
        published_log10: its decimal logarithm.
        threat_model: the assumptions under which the constant holds.
        rows: one `CertificateRow` for each call of a layer, in the order of the calls.
        head: kind of classifier that the model appears to be: `"softmax"`, `"sigmoid"`,
            `"logits"`, `"logit"`, `"token logits"` or `""`.
        pairwise_constants: for each pair of classes a Lipschitz constant of the difference of their
            logits; empty for models that are not classifiers.
        fingerprint: SHA-256 of the weights and activations, see `matches`.
        content_hash: SHA-256 of all the other entries; computed if it is empty. A copy by
            `dataclasses.replace` keeps the hash of the original, and `matches` then tells them
            apart. Anyone can compute a new hash: it detects changes, it is not a signature.

    Example:

    >>> logits = keras_lipattn.SpectralDense(3, name="logits")
    >>> model = keras.Sequential([keras.Input((4,)), logits])
    >>> certificate = keras_lipattn.certify(model)
    >>> [row.path for row in certificate.rows], certificate.total <= 1.0
    (['logits'], True)
    >>> certificate.certified_radius(np.array([[2.0, 1.0, 0.0]])).round(2)
    array([0.71])
    """

    model: str
    total: float
    log10: float
    published_total: float
    published_log10: float
    threat_model: ThreatModel
    rows: tuple[CertificateRow, ...]
    head: str = ""
    pairwise_constants: tuple[tuple[float, ...], ...] = ()
    fingerprint: str = ""
    content_hash: str = ""

    def __post_init__(self):
        if not self.content_hash:
            object.__setattr__(self, "content_hash", hash_of_content(self))

    @property
    def norm(self) -> str:
        """Norm of the certificate: `"l2"`, `"token"` or `"linf"`."""
        return self.threat_model.norm

    @property
    def is_finite(self) -> bool:
        """Whether the total is finite."""
        return math.isfinite(self.total)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons for an infinite total with remedies, one line per cause; empty if it is finite.

        Calls with the same cause share a line. Rows that are `inf` only because of another row
        (`CertificateRow.explained_by`) have no line.
        """
        if self.is_finite:
            return ()
        places: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if not row.is_finite and not row.explained_by:
                places.setdefault((row.layer, row.reason), []).append(row.path)
        causes = []
        for (layer, reason), paths in places.items():
            place, notes = f"`{paths[0]}`", [layer] if layer else []
            if len(paths) > 1:
                place += f" and {len(paths) - 1} more"
                notes.append(f"{len(paths)} places")
            causes.append(place + f" ({', '.join(notes)})" * bool(notes) + f": {reason}")
        if not causes and math.isfinite(self.log10):
            causes = [f"the constant 10^{self.log10:.1f} is too large for a float"]
        return tuple(causes) or (
            "the model has no certified input: all its inputs are integers or masks",
        )

    @property
    def proposals(self) -> tuple[str, ...]:
        """Changes to the model, one line per class of layers; empty if there is little to gain.

        For a finite total, the three most expensive classes with the factor that all their layers
        contribute together, if it is above 1.5 (1.1 where the total is vacuous). For an infinite
        total, the classes without a bound that another layer can replace.
        """
        classes: dict[str, list[CertificateRow]] = {}
        for row in _with_divided_sums(self.rows):
            classes.setdefault(row.layer, []).append(row)
        if math.isinf(self.log10):
            return tuple(_proposals_without_bound(classes))
        costs = {layer: math.fsum(row.cost for row in rows) for layer, rows in classes.items()}
        expensive = sorted(costs, key=lambda layer: -costs[layer])
        lines = [
            f"{_count(layer, [row for row in classes[layer] if row.cost > 0.0])}, "
            f"factor {_factor(costs[layer])}: use {REPLACEMENTS[layer]}"
            for layer in expensive
            # A smaller factor does not justify a change.
            if layer in REPLACEMENTS and costs[layer] > math.log(1.1 if self.vacuous else 1.5)
        ]
        return tuple(lines[:_MOST_PROPOSALS])

    @property
    def vacuous(self) -> str:
        """A text if the total is too large to be useful, else empty.

        A certificate is called vacuous when its total is above 1000: two logits that differ by 1
        are then certified for a radius below 0.0008 only, less than a fifth of one gray level
        of an image in [0, 1].
        """
        if not self.is_finite:
            return "vacuous: nothing finite is certified"
        if self.total > VACUOUS_ABOVE:
            radius = 1.0 / (math.sqrt(2.0) * self.total)
            return (
                f"vacuous: a total of 10^{self.log10:.1f} turns a margin of 1 between two logits "
                f"into a radius of {radius:.1e}"
            )
        return ""

    def row(self, path: str) -> CertificateRow:
        """The row of this path.

        Args:
            path: as in `CertificateRow.path`.

        Returns:
            A `CertificateRow`.

        Raises:
            KeyError: if no row has this path.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"The certificate has no row of this path. Received: path={path!r}")

    # Classifiers ------------------------------------------------------------------------------

    def pairwise_radius(self, logits: Any, *, allowance: float = 0.0) -> np.ndarray:
        """Radius around each input within which each rival class provably does not win.

        Args:
            logits: shape `(..., classes)`, before any softmax.
            allowance: subtracted from every margin, for the rounding of the logits.

        Returns:
            Shape `(..., classes)`: the radius of an open ball, in the norm of the certificate, in
            which the predicted class stays ahead of this class; `inf` for the predicted class
            itself, 0 for ties and logits that are not finite. For a local certificate only radii up
            to that of the threat model are valid.

        Raises:
            ValueError: if the model is not a classifier, `logits` has another number of classes, or
                `allowance` is negative.
        """
        _check_allowance(allowance)
        logits = np.asarray(logits, np.float64)
        pairs = self._pairwise_constants_for(logits)
        classes = logits.shape[-1]
        winner = logits.argmax(axis=-1)
        with np.errstate(invalid="ignore"):
            margins = np.take_along_axis(logits, winner[..., None], axis=-1) - logits - allowance
        speed = pairs[winner]
        # A constant of 0: with equal columns of the last kernel the margin never changes.
        with np.errstate(divide="ignore", invalid="ignore"):
            radii = np.where(margins > 0.0, margins / speed, 0.0)
        radii = np.where(np.isfinite(logits).all(axis=-1, keepdims=True), radii, 0.0)
        own = np.arange(classes) == winner[..., None]
        return np.where(own & np.isfinite(logits), np.inf, np.where(np.isnan(radii), 0.0, radii))

    def certified_radius(self, logits: Any, *, allowance: float = 0.0) -> np.ndarray:
        """Radius of an open ball around each input in which the predicted class provably stays.

        The ball is in the norm of the certificate, within the inputs that the threat model covers.
        A model with a single unit predicts by the sign of its logit. For a local certificate, the
        radius is at most that of the certificate, and `logits` must be those at its center.

        A model that ends in logits of every token, such as a language model, gets a radius for each
        token: changes of all tokens of the input together within it do not change the class of this
        token, since the norm of the logits of one token is at most that of all.

        Args:
            logits: shape `(..., classes)` before any softmax; `(..., 1)` or `(...)` before the
                sigmoid for a model with a single unit; `(batch, tokens, classes)` for logits of
                every token.
            allowance: subtracted from every margin, for the rounding of the logits.

        Returns:
            Shape `(...)`, 0 at ties and where nothing is certified.

        Raises:
            ValueError: if the model is not a classifier, `logits` has another number of classes, or
                `allowance` is negative.
        """
        _check_allowance(allowance)
        if self.head in ("sigmoid", "logit"):
            logits = np.asarray(logits, np.float64)
            if logits.ndim and logits.shape[-1] == 1:
                logits = logits[..., 0]
            with np.errstate(divide="ignore", invalid="ignore"):
                radius = (np.abs(logits) - allowance) / self.total
            radius = np.where(np.isfinite(logits) & (radius > 0.0), radius, 0.0)
        else:
            radius = self.pairwise_radius(logits, allowance=allowance).min(axis=-1)
        return np.minimum(radius, self.threat_model.radius)

    def _pairwise_constants_for(self, logits: np.ndarray) -> np.ndarray:
        if self.head not in ("softmax", "logits", "token logits"):
            raise ValueError(
                "Only a model with one vector of two or more logits per example or token has "
                "margins between classes; for tokens, without a softmax at the end. Received: a "
                f"model whose head is {self.head!r}"
            )
        classes = logits.shape[-1] if logits.ndim else 0
        if self.pairwise_constants:
            if classes != len(self.pairwise_constants):
                raise ValueError(
                    f"`logits` must have {len(self.pairwise_constants)} classes. "
                    f"Received: shape={logits.shape}"
                )
            return np.asarray(self.pairwise_constants)
        if classes < 2:
            raise ValueError(
                f"`logits` must have at least two classes. Received: shape={logits.shape}"
            )
        speed = self.total * (2.0 if self.norm == "linf" else SAFETY * math.sqrt(2.0))
        return np.full((classes, classes), speed)

    # Identity ---------------------------------------------------------------------------------

    def matches(self, model: keras.Model) -> bool:
        """Whether this is the certificate of exactly these weights and activations.

        Other attributes of layers, and their code, are not compared.

        Args:
            model: a built model.

        Returns:
            `True` if the model has the certified names, dtypes, shapes and values of weights and
            the certified names of activations, and the content of the certificate is as it was
            certified. A changed total, an entry outside of its range, or an edited matrix of pairs
            gives `False`.
        """
        try:
            check_values(self)
        except (TypeError, ValueError, AttributeError):
            # After `dataclasses.replace` a field may have another type.
            return False
        return self.content_hash == hash_of_content(self) and self.fingerprint == fingerprint_of(
            model
        )

    # Text -------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from keras_lipattn.certification.report import table

        return table(self)

    def plot(self, path: str | os.PathLike) -> None:
        """Saves a bar chart: factors of the kinds of layers and of each call, the largest first.

        Args:
            path: file to write; its ending determines the format.

        Raises:
            ImportError: if matplotlib is not installed.
            OSError: if the file cannot be written; an existing file is kept.
        """
        from keras_lipattn.certification.report import figure

        save(figure(self), path)

    def to_json(self) -> str:
        """The certificate as JSON. Infinite numbers are the string `"inf"`, or `"-inf"`."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        content["vacuous"] = self.vacuous
        content["reasons"] = self.reasons
        content["proposals"] = self.proposals
        return json.dumps(encode(content), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """The certificate that `to_json` wrote.

        Args:
            text: the JSON.

        Returns:
            A `Certificate` equal to the one written.

        Raises:
            ValueError: if the text is not a certificate, has another schema, an entry has another
                type or is outside of its range, or the content does not have its own hash.
        """
        entries = parse(text, SCHEMA)
        certificate = decode(cls, entries, "certificate")
        check_values(certificate)
        found = hash_of_content(certificate)
        if entries["content_hash"] != found:
            raise ValueError(
                "The content of a certificate must have the hash `content_hash`: it was changed "
                f"after it was certified. Received: {entries['content_hash']!r} for {found}"
            )
        return certificate


def _with_divided_sums(rows: tuple[CertificateRow, ...]) -> Iterator[CertificateRow]:
    """The rows, with the cost of a division in that of the sum just before it: it is a mean."""
    for row, after in zip(rows, (*rows[1:], None), strict=True):
        if row.layer == "Sum" and after and after.layer in ("Divide", "TrueDivide"):
            row = dataclasses.replace(row, cost=row.cost + min(after.cost, 0.0))
        yield row


def _check_allowance(allowance: Any) -> None:
    # Infinite ones, or NaN, leave no radius.
    if np.any(np.asarray(allowance) < 0.0):
        raise ValueError(f"`allowance` must not be negative. Received: allowance={allowance}")


def _proposals_without_bound(classes: dict[str, list[CertificateRow]]):
    for layer, rows in classes.items():
        replacements = [row.replacement for row in rows if not row.is_finite]
        for replacement in dict.fromkeys(filter(None, replacements)):
            count = replacements.count(replacement)
            yield f"{count} {layer}, no bound: use {replacement}"


def _count(layer: str, rows: list[CertificateRow]) -> str:
    return f"{len(rows)} {layer}" + " (x + f(x))" * (layer == "Add")


def _factor(cost: float) -> str:
    """Formats the factor with this natural logarithm."""
    digits = cost / math.log(10.0)
    return f"{math.exp(cost):.3g}" if digits < 4.0 else f"10^{digits:.0f}"
