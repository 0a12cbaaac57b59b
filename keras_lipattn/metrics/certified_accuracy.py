"""The share of examples that are classified correctly, and provably so within a radius."""

import math

import keras
from keras import ops

from keras_lipattn._arguments import require_nonnegative, require_positive


@keras.saving.register_keras_serializable(package="keras_lipattn")
class CertifiedAccuracy(keras.metrics.MeanMetricWrapper):
    """Share of examples whose correct class provably stays the largest logit within a radius.

    An example with logits `z` and class `y` counts if

    ```
    z[y] - max(z[k] for k != y) > sqrt(2) * lipschitz * radius
    ```

    A change of the input of at most `radius` changes the vector of logits by at most
    `lipschitz * radius` in the 2-norm, hence the difference of two logits by at most `sqrt(2)`
    times that. With `radius=0` this is the accuracy, where a tie counts as an error. An example
    with a logit that is NaN or infinite never counts.

    The result is a proof only if `lipschitz` is certified for the weights that the metric is
    computed with: evaluate the trained model with `lipschitz=certify(model).total`. During
    training, with the constant that training aims for, it is a forecast. Logits are taken as real
    numbers; their rounding errors are not subtracted.

    Args:
        radius: The radius, in the 2-norm and the units of the model's input.
        lipschitz: Lipschitz constant of the logits as a function of the input, from the norm of
            `radius` to the 2-norm. With `inf` no example counts unless `radius` is 0.
        name: Name of the metric.
        dtype: Dtype of the metric.

    Call arguments:
        y_true: Integer classes, `(...)` or `(..., 1)`.
        y_pred: Logits, `(..., classes)`.
        sample_weight: Weights of the examples in the mean.

    Example:

    >>> metric = keras_lipattn.metrics.CertifiedAccuracy(radius=0.5, lipschitz=1.0)
    >>> metric.update_state([0, 1, 1], [[1.0, 0.0], [0.0, 0.5], [1.0, 0.0]])
    >>> round(float(metric.result()), 4)
    0.3333

    Reference:
        Tsuzuku, Sato, Sugiyama, "Lipschitz-margin training: scalable certification of perturbation
        invariance for deep neural networks", NeurIPS 2018.
    """

    def __init__(self, radius, lipschitz=1.0, name="certified_accuracy", dtype=None):
        require_nonnegative("radius", radius)
        if lipschitz != math.inf:
            require_positive("lipschitz", lipschitz, optional=False)
        self.radius = float(radius)
        self.lipschitz = float(lipschitz)
        margin = math.sqrt(2.0) * self.lipschitz * self.radius if self.radius else 0.0
        super().__init__(_leads_by, name=name, dtype=dtype, margin=margin)
        self._direction = "up"

    def get_config(self):
        return {
            "name": self.name,
            "dtype": self.dtype,
            "radius": self.radius,
            "lipschitz": self.lipschitz,
        }


def _leads_by(y_true, y_pred, margin):
    """1 where the correct logit exceeds all others by more than `margin`, else 0."""
    logits = ops.convert_to_tensor(y_pred)
    if logits.shape[-1] == 1:
        raise ValueError(
            "`y_pred` must hold the logits of two or more classes. Received: shape="
            f"{tuple(logits.shape)}. For a model with one unit use "
            "`certify(model).certified_radius(logits)`"
        )
    classes = ops.cast(ops.reshape(y_true, ops.shape(logits)[:-1]), "int32")
    correct = ops.one_hot(classes, logits.shape[-1], dtype="bool")
    # A class out of range has no logit: it leads by -inf.
    own = ops.max(ops.where(correct, logits, -math.inf), axis=-1)
    other = ops.max(ops.where(correct, -math.inf, logits), axis=-1)
    certified = (own - other > margin) & ops.all(ops.isfinite(logits), axis=-1)
    return ops.cast(certified, "float32")
