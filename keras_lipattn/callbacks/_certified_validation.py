"""Certified accuracy on validation data, counted in the validation that `fit` runs anyway."""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipattn._arguments import require_nonnegative
from keras_lipattn.certification import Certificate
from keras_lipattn.certification.coverage import are_covered
from keras_lipattn.linalg import SAFETY

# Probabilities below this become it before the logarithm, which makes margins smaller. In float16
# smaller ones have few digits or are rounded to zero.
_TINY = {"float16": float(np.finfo(np.float16).tiny)}
_TINY_ELSEWHERE = 1e-37


def check_radii(radii: Sequence[float]) -> tuple[float, ...]:
    """The radii as floats, each once.

    Raises:
        ValueError: If one is not a nonnegative finite number.
    """
    for radius in radii:
        require_nonnegative("certified_accuracy_radii", radius)
    return tuple(dict.fromkeys(float(radius) for radius in radii))


def key_of(radius: float) -> str:
    """The log key of a radius: `"val_certified_accuracy_0_3"` for 0.3."""
    return "val_certified_accuracy_" + re.sub(r"[^0-9A-Za-z]", "_", f"{radius:g}")


class CertifiedValidation:
    """Counts certified examples while a model is validated.

    It takes the place of the test function of the model during one validation. The certificate is
    made at the first batch, after all callbacks have begun: some of them put other weights into the
    model for its validation. An example of class `y` with logits `z` is certified if
    `z[y] - z[j] > C[y, j] * radius` for all other classes `j`, where `C` are the pairwise constants
    of the certificate.

    Args:
        model: The model in training.
        radii: The radii.
        certify: Returns the certificate of the current weights.

    Raises:
        ValueError: With another backend than TensorFlow, which has no such function.
    """

    def __init__(
        self, model: Any, radii: tuple[float, ...], certify: Callable[[], Certificate]
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`certified_accuracy_radii` needs the TensorFlow backend: elsewhere, call "
                f"`certified_accuracy` after training. Received: {keras.backend.backend()!r}"
            )
        self._model = model
        self._radii = radii
        self._certify = certify
        self._replaced: Any = None
        self._function: Any = None
        self._original: Any = None
        self._head = ""
        self._gaps: Any = None
        self._certificate: Any = None
        self._metrics: list[keras.metrics.Mean] = []
        self._found: dict[str, float] = {}
        self._warned = False

    def begin(self) -> None:
        """Takes the place of the test function; at the beginning of a validation."""
        self._found = {}
        if isinstance(self._model.test_function, CertifiedValidation):
            # A validation ended in an exception.
            self._model.test_function = self._model.test_function._replaced
        self._replaced = self._model.test_function
        self._function = None
        self._model.test_function = self

    def end(self) -> None:
        """Gives the model its test function back; at the end of a validation."""
        if self._model.test_function is self:
            self._model.test_function = self._replaced
        if self._function is not None:
            self._found = {
                key_of(radius): float(metric.result())
                for radius, metric in zip(self._radii, self._metrics, strict=True)
            }

    def results(self) -> dict[str, float]:
        """Maps log keys to the results of the validation of this epoch, if there was one."""
        found, self._found = self._found, {}
        if not found and not self._metrics and not self._warned:
            self._warned = True
            warnings.warn(
                "The first epoch had no validation, so it has no certified accuracy. "
                "`certified_accuracy_radii` needs `validation_data` in `fit`.",
                stacklevel=3,
            )
        return found

    def __call__(self, *args: Any) -> Any:
        if self._function is None:
            self._function = self._start()
        # The outputs of the model are seen where its metrics are computed. The attribute of the
        # instance is found before the method, and Keras does not track it this way.
        own = vars(self._model)
        self._original, replaced = self._model.compute_metrics, own.get("compute_metrics")
        own["compute_metrics"] = self._compute_metrics
        try:
            return self._function(*args)
        finally:
            del own["compute_metrics"]
            if replaced is not None:
                own["compute_metrics"] = replaced

    def _start(self) -> Callable:
        certificate = self._certify()
        if certificate.head not in ("softmax", "logits"):
            raise ValueError(
                "`certified_accuracy_radii` is for classifiers with one vector of two or more "
                "logits or probabilities an example. For logits of every token call "
                "`certified_accuracy` after training, or compile with the metric "
                f"`CertifiedAccuracy`. Received: model {self._model.name!r}, whose head is "
                f"{certificate.head!r}"
            )
        self._certificate = certificate
        gaps = _gaps(certificate, self._radii)
        if self._head != certificate.head:
            self._head = certificate.head
            with self._model.distribute_strategy.scope():
                self._metrics = [keras.metrics.Mean(name=key_of(r)) for r in self._radii]
                self._gaps = keras.Variable(gaps, trainable=False, dtype="float32")
        self._gaps.assign(gaps)
        for metric in self._metrics:
            metric.reset_state()
        self._model.make_test_function(force=True)
        made, self._model.test_function = self._model.test_function, self
        return made

    def _compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        logits = ops.cast(y_pred, "float32")
        if self._head == "softmax":
            # The entries of a log-softmax are not positive, and not all are 0.
            is_log = ops.any(logits < 0.0, axis=-1, keepdims=True)
            dtype = keras.backend.standardize_dtype(y_pred.dtype)
            tiny = _TINY.get(dtype, _TINY_ELSEWHERE)
            logits = ops.where(is_log, logits, ops.log(ops.maximum(logits, tiny)))
        classes = logits.shape[-1]
        if len(y.shape) == 2 and y.shape[-1] == classes:
            y = ops.argmax(y, axis=-1)
        y = ops.reshape(ops.cast(y, "int32"), (-1,))
        others = ops.one_hot(y, classes) == 0.0
        # A class out of range has no logit: it is never certified.
        counted = ops.any(~others, axis=-1) & ops.all(ops.isfinite(logits), axis=-1)
        covered = are_covered(self._certificate, self._model, x)
        own = ops.sum(ops.where(others, 0.0, logits), axis=-1, keepdims=True)
        rows = ops.clip(y, 0, self._gaps.shape[1] - 1)
        for index, metric in enumerate(self._metrics):
            needed = ops.take(self._gaps[index], rows, axis=0)
            leads = ops.all((own - logits > needed) | ~others, axis=-1)
            leads = leads & covered if self._radii[index] else leads
            metric.update_state(ops.cast(leads & counted, "float32"), sample_weight)
        return self._original(x, y, y_pred, sample_weight)


def _gaps(certificate: Certificate, radii: tuple[float, ...]) -> np.ndarray:
    """For each radius and pair of classes, how far the logits must be apart, rounded up.

    Returns:
        `(radii, classes, classes)`, or `(radii, 1, 1)` with more classes than have pairs.
    """
    pairs = np.asarray(certificate.pairwise_constants, np.float64)
    if not pairs.size:
        factor = 2.0 if certificate.norm == "linf" else SAFETY * np.sqrt(2.0)
        pairs = np.full((1, 1), factor * certificate.total)
    with np.errstate(over="ignore"):
        gaps = [
            # A constant may be infinite.
            np.nextafter((radius * pairs).astype(np.float32), np.float32(np.inf))
            if radius
            else np.zeros(pairs.shape, np.float32)
            for radius in radii
        ]
    return np.stack(gaps)
