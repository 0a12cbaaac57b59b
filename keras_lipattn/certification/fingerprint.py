"""A fingerprint of the weights of a model and of the names of its activations."""

import hashlib

import keras
import numpy as np

from keras_lipattn.layers.lipschitz_layer import LipschitzLayer


def fingerprint_of(model: keras.Model) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the weights, in order, and activations.

    An activation has a part in it by its name, so that another one set after `certify` is noticed.
    Other attributes and the code of layers have none. The running norms and penalty weights of this
    package's layers are left out, since the output at inference does not depend on them.

    Args:
        model: a built model.

    Returns:
        64 hexadecimal digits.

    Example:

    >>> from keras_lipattn.certification import fingerprint_of
    >>> model = keras.Sequential([keras.Input((4,)), keras_lipattn.SpectralDense(3)])
    >>> keras_lipattn.certify(model).fingerprint == fingerprint_of(model)
    True
    """
    digest = hashlib.sha256()
    skipped = {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, LipschitzLayer)
        for variable in bookkeeping(layer)
    }
    for variable in model.weights:
        if id(variable) in skipped:
            continue
        value = np.ascontiguousarray(
            keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))
        )
        name = f"{variable.path} {variable.dtype} {tuple(value.shape)};"
        digest.update(name.encode())
        # Its bytes, without a copy.
        digest.update(value.reshape(-1).view(np.uint8).data)
    for layer in model._flatten_layers():
        activation = getattr(layer, "activation", None)
        if activation is not None and activation is not keras.activations.linear:
            name = getattr(activation, "__name__", type(activation).__name__)
            digest.update(f"{layer.name} {name};".encode())
    return digest.hexdigest()


def bookkeeping(layer: LipschitzLayer) -> list:
    """Weights of a layer of this package that its output at inference does not depend on."""
    names = ("running_bound", "penalty_coefficient", "penalty_log_target")
    kept = [getattr(layer, name, None) for name in names]
    return [*getattr(layer, "_vectors", {}).values(), *(v for v in kept if v is not None)]
