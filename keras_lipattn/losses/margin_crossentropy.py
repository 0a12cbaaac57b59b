"""Cross-entropy that asks the correct class to lead by the margin that certifies a radius."""

import math

import keras
from keras import ops

from keras_lipattn._arguments import require_nonnegative, require_positive


@keras.saving.register_keras_serializable(package="keras_lipattn")
class MarginCrossentropy(keras.losses.Loss):
    """Cross-entropy after the logit of the correct class is lowered by the margin of a radius.

    For logits `z` and class `y`, with temperature `t`:

    ```
    loss = crossentropy(softmax(t * (z - sqrt(2) * lipschitz * radius * onehot(y))), y) / t
    ```

    A change of the input of at most `radius` changes the difference of two logits by at most
    `sqrt(2) * lipschitz * radius`, so an example with a small loss is certified at this radius.
    The logits of a model with a Lipschitz bound cannot grow without limit. Without a temperature
    their cross-entropy stays large for every example, and its gradient treats all margins alike.

    Args:
        radius: The radius to certify, in the 2-norm and the units of the model's input. Zero gives
            cross-entropy with a temperature.
        temperature: Factor `t` of the logits. A larger one gives less weight to examples whose
            margin is already large enough.
        lipschitz: The Lipschitz constant of the logits as a function of the input, in the 2-norm,
            that training aims for. It only sets the size of the margin; the loss neither measures
            nor bounds the constant.
        reduction: As for `keras.losses.Loss`.
        name: Name of the loss.
        dtype: As for `keras.losses.Loss`.

    Call arguments:
        y_true: Integer classes, `(...)` or `(..., 1)`.
        y_pred: Logits, `(..., classes)`.

    Example:

    >>> loss = keras_lipattn.losses.MarginCrossentropy(radius=0.1, temperature=10.0)
    >>> logits = np.array([[2.0, -1.0, 0.0], [0.5, 0.4, 0.0]], "float32")
    >>> float(loss(np.array([0, 1]), logits)) < float(loss(np.array([1, 2]), logits))
    True

    Reference:
        Prach, Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks",
        ECCV 2022.
    """

    def __init__(
        self,
        radius,
        temperature=1.0,
        lipschitz=1.0,
        reduction: str | None = "sum_over_batch_size",
        name="margin_crossentropy",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        require_nonnegative("radius", radius)
        require_positive("temperature", temperature, optional=False)
        require_positive("lipschitz", lipschitz, optional=False)
        self.radius = float(radius)
        self.temperature = float(temperature)
        self.lipschitz = float(lipschitz)

    def call(self, y_true, y_pred):
        classes = ops.cast(ops.reshape(y_true, ops.shape(y_pred)[:-1]), "int32")
        correct = ops.one_hot(classes, y_pred.shape[-1], dtype=y_pred.dtype)
        margin = math.sqrt(2.0) * self.lipschitz * self.radius
        logits = self.temperature * (y_pred - margin * correct)
        losses = keras.losses.sparse_categorical_crossentropy(classes, logits, from_logits=True)
        return losses / self.temperature

    def get_config(self):
        return {
            **super().get_config(),
            "radius": self.radius,
            "temperature": self.temperature,
            "lipschitz": self.lipschitz,
        }
