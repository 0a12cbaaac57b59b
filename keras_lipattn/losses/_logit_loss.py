"""Base of the losses that take logits."""

import keras


class LogitLoss(keras.losses.Loss):
    """A loss of logits, which refuses the output of a softmax or sigmoid.

    Keras marks such outputs on the TensorFlow backend. On other backends they are not noticed.
    """

    def __call__(self, y_true, y_pred, sample_weight=None):
        # Before the cast of the base class, which loses the mark.
        if hasattr(y_pred, "_keras_logits"):
            raise ValueError(
                f"`{type(self).__name__}` takes logits: build the model without a softmax or "
                "sigmoid at the end, or pass `logits=True` to `make_lipschitz`. Received: y_pred "
                "with the probabilities that such an activation returns"
            )
        return super().__call__(y_true, y_pred, sample_weight)
