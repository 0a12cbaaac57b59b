"""Residual connections with a known Lipschitz constant."""

import collections
import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops
from scipy.special import expit

# Operations of a graph that are searched for the skip.
_LONGEST_BRANCH = 100


@keras.saving.register_keras_serializable(package="keras_lipattn")
class Residual(keras.layers.Layer):
    """Residual connection: `x + f(x)`, or the convex combination `(1 - alpha) x + alpha f(x)`.

    If the branch `f` has the constant `L`, the sum has the constant `1 + L`. The convex combination
    has `1 - alpha + alpha L`. This is at most 1 if `L` is at most 1, so the constant of a deep
    network does not grow with its depth.

    Args:
        alpha: `None` for the sum, or the weight of the branch, in `[0, 1]`.
        trainable_alpha: Whether `alpha` is learned, as the logistic function of a weight, so that
            it stays in `(0, 1)`. Its initial value must be strictly between 0 and 1.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A pair `[x, f(x)]` of tensors of the same shape. The order `[f(x), x]` is noticed
            in the graph of a Functional model, with a warning if `alpha` is below 1/2.

    Raises:
        ValueError: If `alpha` is out of range, or the inputs are not two tensors of the same shape.

    Example:

    >>> x = keras.Input((10, 64))
    >>> y = Residual(alpha=0.5)([x, SpectralDense(64)(x)])
    >>> y.shape
    (None, 10, 64)
    """

    def __init__(self, alpha=None, trainable_alpha=False, **kwargs):
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise ValueError(f"`alpha` must be `None` or in [0, 1]. Received: alpha={alpha}")
        if trainable_alpha and (alpha is None or not 0.0 < alpha < 1.0):
            raise ValueError(
                "`trainable_alpha` needs an initial `alpha` strictly between 0 and 1. "
                f"Received: alpha={alpha}"
            )
        super().__init__(**kwargs)
        self.supports_masking = True
        self.alpha: Any = alpha
        self.trainable_alpha = trainable_alpha

    def __call__(self, inputs, *others, **kwargs):
        # `build` runs once only. Later inputs of different shapes would broadcast.
        if others:
            raise _shape_error(f"{1 + len(others)} positional arguments")
        if not isinstance(inputs, list | tuple):
            raise _shape_error(f"a single input, input_shape={_shape_of(inputs)}")
        _require_same_shapes([_shape_of(each) for each in inputs])
        # With a larger weight it is meant so, as by `make_lipschitz` for `Add()([f(x), x])`.
        if self.alpha is not None and self.alpha < 0.5 and _is_computed_from(*inputs):
            warnings.warn(
                f"The first tensor of `Residual` {self.name!r} is computed from the second, so "
                "`alpha` is the weight of the skip. To give it to the branch, write "
                "`Residual()([x, f(x)])`.",
                stacklevel=2,
            )
        return super().__call__(inputs, **kwargs)

    def build(self, input_shape):
        _require_same_shapes(input_shape)
        self.alpha_logit = None
        if self.trainable_alpha:
            start = math.log(self.alpha / (1.0 - self.alpha))
            self.alpha_logit = self.add_weight(
                name="alpha_logit",
                shape=(),
                initializer=keras.initializers.Constant(start),
                autocast=False,
            )

    def call(self, inputs):
        skip, branch = inputs
        if self.alpha is None:
            return skip + branch
        alpha = self.alpha
        if self.alpha_logit is not None:
            alpha = ops.cast(ops.sigmoid(ops.convert_to_tensor(self.alpha_logit)), skip.dtype)
        return skip + alpha * (branch - skip)

    def alpha_value(self):
        """Current weight of the branch as a float, or `None` for the sum."""
        if self.alpha_logit is None:
            return self.alpha
        return float(expit(np.float64(self.alpha_logit.numpy())))

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[0]

    def compute_output_shape(self, input_shape):
        _require_same_shapes(input_shape)
        return tuple(input_shape[0])

    def get_config(self):
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "trainable_alpha": self.trainable_alpha,
        }


def _require_same_shapes(shapes):
    """Raise a `ValueError` unless these are two shapes that may be equal."""
    if len(shapes) != 2 or not all(isinstance(shape, list | tuple) for shape in shapes):
        raise _shape_error(f"input_shape={shapes}")
    one, other = shapes
    # An axis of unknown size matches every size.
    if len(one) != len(other) or any(
        None not in sides and sides[0] != sides[1] for sides in zip(one, other, strict=True)
    ):
        raise _shape_error(f"input_shape={shapes}")


def _shape_error(received):
    return ValueError(
        "`Residual` merges a list of two tensors of the same shape, a skip and a branch: call it "
        f"as `Residual()([x, f(x)])`. Received: {received}"
    )


def _is_computed_from(tensor, other):
    """Whether `other` is among the tensors of the graph that `tensor` is computed from."""
    if not (isinstance(tensor, keras.KerasTensor) and isinstance(other, keras.KerasTensor)):
        return False
    waiting, seen = collections.deque([tensor]), set()
    # A branch has few operations. What comes before a skip may be a whole model.
    while waiting and len(seen) < _LONGEST_BRANCH:
        history = getattr(waiting.popleft(), "_keras_history", None)
        if history is None or history.operation is None:
            continue
        node = history.operation._inbound_nodes[history.node_index]
        if id(node) in seen:
            continue
        seen.add(id(node))
        if any(each is other for each in node.input_tensors):
            return True
        waiting.extend(node.input_tensors)
    return False


def _shape_of(tensor):
    shape = getattr(tensor, "shape", None)
    return None if shape is None else tuple(shape)
