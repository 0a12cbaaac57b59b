"""Values, largest slopes and ranges of activations, with the default parameters of Keras."""

import math

import numpy as np
import scipy.special

from keras_lipattn.bounds.layer_constants import activation_constant
from keras_lipattn.checker.refusal import require
from keras_lipattn.checker.tensor_bounds import Ball, Bounds, elementwise, log_of
from keras_lipattn.linalg import SAFETY

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _relu6(x):
    return np.clip(x, 0.0, 6.0)


_VALUES = {
    "celu": lambda x: np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0))),
    "elu": lambda x: np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0))),
    "gelu": lambda x: 0.5 * x * scipy.special.erfc(-x / math.sqrt(2.0)),
    "hard_sigmoid": lambda x: _relu6(x + 3.0) / 6.0,
    "hard_silu": lambda x: x * _relu6(x + 3.0) / 6.0,
    "hard_tanh": lambda x: np.clip(x, -1.0, 1.0),
    "leaky_relu": lambda x: np.where(x > 0.0, x, 0.2 * x),
    "linear": lambda x: x,
    "log_sigmoid": lambda x: -np.logaddexp(0.0, -x),
    "log_softmax": lambda x: scipy.special.log_softmax(x, axis=-1),
    "mish": lambda x: x * np.tanh(np.logaddexp(0.0, x)),
    "relu": lambda x: np.maximum(x, 0.0),
    "relu6": _relu6,
    "selu": lambda x: (
        _SELU_SCALE * np.where(x > 0.0, x, _SELU_ALPHA * np.expm1(np.minimum(x, 0.0)))
    ),
    "sigmoid": scipy.special.expit,
    "silu": lambda x: x * scipy.special.expit(x),
    "softmax": lambda x: scipy.special.softmax(x, axis=-1),
    "softplus": lambda x: np.logaddexp(0.0, x),
    "softsign": lambda x: x / (1.0 + np.abs(x)),
    "squareplus": lambda x: 0.5 * (x + np.sqrt(x * x + 4.0)),
    "tanh": np.tanh,
    "tanh_shrink": lambda x: x - np.tanh(x),
}
_LIMITS = {
    "hard_sigmoid": (0.0, 1.0),
    "hard_tanh": (-1.0, 1.0),
    "relu6": (0.0, 6.0),
    "sigmoid": (0.0, 1.0),
    "softsign": (-1.0, 1.0),
    "tanh": (-1.0, 1.0),
}
# Absolute values at 0, rounded up, where they are not 0.
_AT_ZERO = {
    "hard_sigmoid": 0.5,
    "log_sigmoid": 0.693148,
    "sigmoid": 0.5,
    "softplus": 0.693148,
    "squareplus": 1.0,
}


def value(name: str, x: np.ndarray) -> np.ndarray:
    """The activation of an array in float64; softmax is along the last axis."""
    return _VALUES[name](x)


def bounds(name: str, state: Bounds, norm: str, layer: str) -> Bounds:
    """Bounds after an activation."""
    require(name in _VALUES, f"no independent check of the activation {name!r} of {layer}")
    if name == "linear":
        return state
    constant = activation_constant(name, norm, width=state.width)
    if name in ("softmax", "log_softmax"):
        if name == "softmax":
            ball = Ball(1.0, None, 1.0)
        else:
            largest = SAFETY * (2.0 * state.ball.largest + math.log(state.width or 1))
            ball = Ball()
            if math.isfinite(largest):
                ball = Ball.of_entries(-largest, largest, state.width)
        return Bounds(state.log + log_of(constant), state.shape, state.varies, ball)
    return elementwise(state, constant, _AT_ZERO.get(name, 0.0), _LIMITS.get(name))
