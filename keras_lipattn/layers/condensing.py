"""Running a model with its caps turned into constants."""

import contextlib

import keras

from keras_lipattn.layers.lipschitz_layer import LipschitzLayer

_FUNCTIONS = ("train_function", "test_function", "predict_function")


@contextlib.contextmanager
def condensed(model):
    """Context in which layers call with constants: capped, folded, no norms in the graph.

    Functions traced inside keep the constants: they contain no power iteration, no Gram iteration
    and no decomposition, and refer to fresh variables instead of the kernels. `layer.lipschitz()`
    certifies exactly these constants. The weights of the model are not touched, and what `predict`
    and its like traced outside is put back in the end: they never serve stale constants.

    Args:
        model: A built `keras.Model` or layer.

    Yields:
        The list of the fresh variables.

    Raises:
        ValueError: If a layer is not built, or condensed already.

    Example:

    >>> layer = keras_lipattn.L2MultiHeadAttention(2, 4, lipschitz_bound=1.0)
    >>> model = keras.Sequential([keras.Input((6, 8)), layer])
    >>> x = keras.random.normal((2, 6, 8))
    >>> with keras_lipattn.condensed(model) as constants:
    ...     y = model(x)
    >>> bool(np.allclose(y, model(x), atol=1e-5)), len(constants)
    (True, 2)
    """
    layers = lipschitz_layers(model)
    models = [part for part in model._flatten_layers() if isinstance(part, keras.Model)]
    traced = [{name: getattr(part, name) for name in _FUNCTIONS} for part in models]
    entered = []
    try:
        for layer in layers:
            layer.enter_condensed()
            entered.append(layer)
        for part in models:
            _set_functions(part, dict.fromkeys(_FUNCTIONS))
        yield [variable for layer in layers for variable in layer.condensed_variables]
    finally:
        for layer in entered:
            layer.leave_condensed()
        for part, functions in zip(models, traced, strict=True):
            _set_functions(part, functions)


def lipschitz_layers(model):
    """The Lipschitz layers in `model`, at any depth, each once, in order.

    Args:
        model: A `keras.Model` or layer.

    Returns:
        A list of `LipschitzLayer`s.

    Example:

    >>> dense = keras_lipattn.SpectralDense(3, name="dense")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU(), dense])
    >>> [layer.name for layer in keras_lipattn.layers.lipschitz_layers(model)]
    ['dense']
    """
    return [layer for layer in model._flatten_layers() if isinstance(layer, LipschitzLayer)]


def _set_functions(model, functions):
    for name, function in functions.items():
        setattr(model, name, function)
