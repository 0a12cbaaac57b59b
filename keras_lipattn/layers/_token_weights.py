"""Tokens with weights: a sequence as a measure."""

import keras
from keras import ops

from keras_lipattn.layers._eager import has_value


def check_token_weights(weights, lipschitz_bound):
    """Raises a `ValueError` for weights that are negative, or that a cap is not for."""
    if lipschitz_bound is not None:
        raise ValueError(
            "`lipschitz_bound` caps a bound for tokens of equal weight: a layer that is called "
            "with `token_weights` cannot have it. "
            f"Received: lipschitz_bound={lipschitz_bound}"
        )
    if isinstance(weights, keras.KerasTensor) or not has_value(weights):
        return
    least = float(ops.min(weights)) if 0 not in weights.shape else 0.0
    if least < 0.0:
        raise ValueError(f"`token_weights` must not be negative. Received: a weight of {least}")


def log_weights(weights, valid, dtype):
    """What weights add to the scores of their keys, `(B, T)`.

    A negative weight in a graph becomes NaN, and so does what sees it. At padded tokens, those of
    weight 0 among them, neither value nor derivative can be anything but 0.
    """
    weights = ops.cast(weights, dtype)
    return ops.log(ops.where(valid, weights, ops.ones_like(weights)))
