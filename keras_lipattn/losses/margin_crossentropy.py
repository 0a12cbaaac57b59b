"""Cross-entropies that ask the correct class to lead by the margin that certifies a radius."""

import math

import keras
from keras import ops
from keras.src import backend

from keras_lipattn._arguments import require_nonnegative, require_positive
from keras_lipattn.losses._logit_loss import LogitLoss


class _MarginLoss(LogitLoss):
    """The arguments that both losses have, and the margin they ask for."""

    def __init__(self, radius, temperature, lipschitz, ignore_class, reduction, name, dtype):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        require_nonnegative("radius", radius)
        require_positive("temperature", temperature, optional=False)
        require_positive("lipschitz", lipschitz, optional=False)
        self.radius = float(radius)
        self.temperature = float(temperature)
        self.lipschitz = float(lipschitz)
        self.ignore_class = ignore_class
        self.margin = math.sqrt(2.0) * self.lipschitz * self.radius

    def call(self, y_true, y_pred):
        classes = ops.cast(ops.reshape(y_true, ops.shape(y_pred)[:-1]), "int32")
        if self.ignore_class is None:
            return self.losses(classes, y_pred)
        counts = ops.not_equal(classes, self.ignore_class)
        losses = self.losses(ops.where(counts, classes, 0), y_pred)
        losses = ops.where(counts, losses, 0.0)
        # Keras takes the mean over the entries of this mask, as for its own `ignore_class`.
        backend.set_keras_mask(losses, counts)
        return losses

    def losses(self, classes, logits):
        """The losses `(...)` for integer classes `(...)` and logits `(..., classes)`."""
        raise NotImplementedError

    def get_config(self):
        return {
            **super().get_config(),
            "radius": self.radius,
            "temperature": self.temperature,
            "lipschitz": self.lipschitz,
            "ignore_class": self.ignore_class,
        }


@keras.saving.register_keras_serializable(package="keras_lipattn")
class MarginCrossentropy(_MarginLoss):
    """Cross-entropy after the logit of the correct class is lowered by the margin of a radius.

    For logits `z` and class `y`, with temperature `t`:

    ```
    p = softmax(t * (z - sqrt(2) * lipschitz * radius * onehot(y)))[y]
    loss = -(1 - p) ** annealing * log(p) / t
    ```

    A change of the input of at most `radius` changes the difference of two logits by at most
    `sqrt(2) * lipschitz * radius`, so an example with a small loss is certified at this radius.
    The logits of a model with a Lipschitz bound cannot grow without limit. Without a temperature
    their cross-entropy stays large for every example, and its gradient treats all margins alike.
    `annealing` lowers the weight of examples that already have the margin further.

    Args:
        radius: The radius to certify, in the 2-norm and the units of the model's input. Zero gives
            cross-entropy with a temperature.
        temperature: Factor `t` of the logits. A larger one gives less weight to examples whose
            margin is already large enough.
        lipschitz: The Lipschitz constant of the logits as a function of the input, in the 2-norm,
            that training aims for. It only sets the size of the margin; the loss neither measures
            nor bounds the constant.
        annealing: Power of `1 - p`, not negative; 0 gives cross-entropy. Lai et al. use 5.
        ignore_class: A class whose entries do not count, such as -1 for padded tokens.
        reduction: As for `keras.losses.Loss`.
        name: Name of the loss.
        dtype: As for `keras.losses.Loss`.

    Call arguments:
        y_true: Integer classes, `(...)` or `(..., 1)`.
        y_pred: Logits, `(..., classes)`.

    Raises:
        ValueError: If an argument is out of range, or `y_pred` comes from a softmax or sigmoid
            (noticed on TensorFlow only).

    Example:

    >>> loss = keras_lipattn.losses.MarginCrossentropy(radius=0.1, temperature=10.0)
    >>> logits = np.array([[2.0, -1.0, 0.0], [0.5, 0.4, 0.0]], "float32")
    >>> float(loss(np.array([0, 1]), logits)) < float(loss(np.array([1, 2]), logits))
    True

    Reference:
        Prach, Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks",
        ECCV 2022; `annealing` from Lai et al., "Enhancing certified robustness via block reflector
        orthogonal layers and logit annealing loss", ICML 2025.
    """

    def __init__(
        self,
        radius,
        temperature=1.0,
        lipschitz=1.0,
        annealing=0.0,
        ignore_class=None,
        reduction: str | None = "sum_over_batch_size",
        name="margin_crossentropy",
        dtype=None,
    ):
        super().__init__(radius, temperature, lipschitz, ignore_class, reduction, name, dtype)
        require_nonnegative("annealing", annealing)
        self.annealing = float(annealing)

    def losses(self, classes, logits):
        correct = ops.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
        losses = _crossentropy(classes, logits - self.margin * correct, self.temperature)
        if self.annealing:
            # `-expm1(-loss)` is `1 - p`. At 0 the power of a number below 1 has no derivative.
            other = -ops.expm1(-self.temperature * losses)
            losses = losses * ops.power(ops.maximum(other, 1e-7), self.annealing)
        return losses

    def get_config(self):
        return {**super().get_config(), "annealing": self.annealing}


@keras.saving.register_keras_serializable(package="keras_lipattn")
class EfficientMarginCrossentropy(_MarginLoss):
    """Cross-entropy after every other class is raised by what an attack can give it at most.

    For logits `z` and class `y`, with temperature `t` and `K = sqrt(2) * lipschitz`:

    ```
    distance[k] = clip((z[y] - z[k]) / K, 0, radius), a constant for the gradient
    loss = crossentropy(softmax(t * (z + K * distance)), y) / t
    ```

    A class that already leads, or that an attack within `radius` can bring level, is raised no
    further than to a tie. `MarginCrossentropy` raises all by `K * radius`: it asks for the whole
    radius even where an example is far from it. Both are equal once every margin is large enough.
    A loss below `log(2) / t` means that the example is certified at `radius`. The source takes a
    constant `K` for each pair of classes. If the last layer is an `OrthogonalDense` with at least
    as many features as classes, all of them are this `K`.

    Args:
        radius: The radius to certify, in the 2-norm and the units of the model's input.
        temperature: Factor `t` of the logits.
        lipschitz: The Lipschitz constant of the logits as a function of the input, in the 2-norm,
            that training aims for. The loss neither measures nor bounds the constant.
        ignore_class: A class whose entries do not count, such as -1 for padded tokens.
        reduction: As for `keras.losses.Loss`.
        name: Name of the loss.
        dtype: As for `keras.losses.Loss`.

    Call arguments:
        y_true: Integer classes, `(...)` or `(..., 1)`.
        y_pred: Logits, `(..., classes)`.

    Raises:
        ValueError: If an argument is out of range, or `y_pred` comes from a softmax or sigmoid
            (noticed on TensorFlow only).

    Example:

    >>> loss = keras_lipattn.losses.EfficientMarginCrossentropy(radius=0.1, temperature=10.0)
    >>> logits = np.array([[2.0, -1.0, 0.0], [0.5, 0.4, 0.0]], "float32")
    >>> float(loss(np.array([0, 1]), logits)) < float(loss(np.array([1, 2]), logits))
    True

    Reference:
        Hu et al., "Unlocking deterministic robustness certification on ImageNet", NeurIPS 2023
        (the EMMA loss).
    """

    def __init__(
        self,
        radius,
        temperature=1.0,
        lipschitz=1.0,
        ignore_class=None,
        reduction: str | None = "sum_over_batch_size",
        name="efficient_margin_crossentropy",
        dtype=None,
    ):
        super().__init__(radius, temperature, lipschitz, ignore_class, reduction, name, dtype)

    def losses(self, classes, logits):
        correct = ops.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
        lead = ops.sum(correct * logits, axis=-1, keepdims=True) - logits
        raised = ops.stop_gradient(ops.clip(lead, 0.0, self.margin))
        return _crossentropy(classes, logits + raised, self.temperature)


def _crossentropy(classes, logits, temperature):
    logits = temperature * logits
    losses = keras.losses.sparse_categorical_crossentropy(classes, logits, from_logits=True)
    return losses / temperature
