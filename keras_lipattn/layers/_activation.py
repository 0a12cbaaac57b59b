"""The Lipschitz constant of an activation function object."""

import keras

from keras_lipattn.bounds import layer_constants


def activation_constant(function, norm):
    """Constant of a `keras.activations` function in `norm`, and the reason when it is `inf`.

    Only the very functions of Keras count, with their default arguments: a function of the same
    name may do anything.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        known = keras.activations.get(name)
    except ValueError:
        known = None
    if known is not function:
        return float("inf"), f"{name!r} is not an activation of Keras: its constant is unknown"
    if name in layer_constants.UNBOUNDED_ACTIVATIONS:
        return float("inf"), layer_constants.UNBOUNDED_ACTIVATIONS[name]
    try:
        return layer_constants.activation_constant(name, norm), ""
    except KeyError:
        return float("inf"), f"the activation {name!r} has no known Lipschitz constant"
