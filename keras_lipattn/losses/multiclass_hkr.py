"""The hinge loss with the dual of the Wasserstein distance, for several classes."""

import math

import keras
from keras import ops

from keras_lipattn._arguments import require_nonnegative, require_positive
from keras_lipattn.losses._logit_loss import LogitLoss


@keras.saving.register_keras_serializable(package="keras_lipattn")
class MulticlassHKR(LogitLoss):
    """Hinge loss at a margin, less the mean difference of logits between classes.

    For logits `z` and classes `y`, with the margin `m = sqrt(2) * lipschitz * radius`:

    ```
    hinge = max(0, m/2 - z[y]) + mean(max(0, m/2 + z[k]) for k != y)
    kr = mean over classes k of mean(z[k] where y == k) - mean(z[k] where y != k)
    loss = alpha * mean(hinge) - (1 - alpha) * kr
    ```

    `kr` is taken over a batch; a class that no example or every example of the batch has adds
    nothing. For a model with Lipschitz constant 1 its largest value is a mean of Wasserstein
    distances between a class and the others (Kantorovich-Rubinstein duality). An example with a
    hinge of 0 is certified at `radius`.

    Args:
        radius: The radius to certify, in the 2-norm and the units of the model's input.
        alpha: Weight of the hinge, in [0, 1]. A smaller one gives wider margins and less accuracy.
        lipschitz: The Lipschitz constant of the logits as a function of the input, in the 2-norm,
            that training aims for. The loss neither measures nor bounds the constant.
        reduction: As for `keras.losses.Loss`. With `None` the values of the examples are those
            whose mean is the loss.
        name: Name of the loss.
        dtype: As for `keras.losses.Loss`.

    Call arguments:
        y_true: Integer classes, `(batch,)` or `(batch, 1)`.
        y_pred: Logits, `(batch, classes)`.

    Raises:
        ValueError: If an argument is out of range, or `y_pred` has another shape or comes from a
            softmax or sigmoid (noticed on TensorFlow only).

    Example:

    >>> loss = keras_lipattn.losses.MulticlassHKR(radius=0.1)
    >>> logits = np.array([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0]], "float32")
    >>> float(loss(np.array([0, 1]), logits)) < float(loss(np.array([1, 0]), logits))
    True

    Reference:
        Serrurier et al., "Achieving robustness in classification using optimal transport with
        hinge regularization", CVPR 2021.
    """

    def __init__(
        self,
        radius,
        alpha=0.98,
        lipschitz=1.0,
        reduction: str | None = "sum_over_batch_size",
        name="multiclass_hkr",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        require_nonnegative("radius", radius)
        require_nonnegative("alpha", alpha)
        if alpha > 1.0:
            raise ValueError(f"`alpha` must be at most 1. Received: alpha={alpha}")
        require_positive("lipschitz", lipschitz, optional=False)
        self.radius = float(radius)
        self.alpha = float(alpha)
        self.lipschitz = float(lipschitz)

    def call(self, y_true, y_pred):
        num_classes = y_pred.shape[-1]
        if len(y_pred.shape) != 2 or num_classes < 2:
            raise ValueError(
                "Logits must have the shape (batch, classes), with two classes or more. "
                f"Received: y_pred.shape={tuple(y_pred.shape)}"
            )
        classes = ops.cast(ops.reshape(y_true, ops.shape(y_pred)[:-1]), "int32")
        own = ops.one_hot(classes, num_classes, dtype=y_pred.dtype)
        half = 0.5 * math.sqrt(2.0) * self.lipschitz * self.radius
        sign = 2.0 * own - 1.0
        hinge = ops.relu(half - sign * y_pred)
        hinge = ops.sum(hinge * (own + (1.0 - own) / (num_classes - 1)), axis=-1)
        count = ops.sum(own, axis=0, keepdims=True)
        total = ops.cast(ops.shape(own)[0], y_pred.dtype)
        both = ops.cast((count > 0.0) & (count < total), y_pred.dtype)
        weight = total * (own / ops.maximum(count, 1.0))
        weight -= total * ((1.0 - own) / ops.maximum(total - count, 1.0))
        kr = ops.mean(both * weight * y_pred, axis=-1)
        return self.alpha * hinge - (1.0 - self.alpha) * kr

    def get_config(self):
        return {
            **super().get_config(),
            "radius": self.radius,
            "alpha": self.alpha,
            "lipschitz": self.lipschitz,
        }
