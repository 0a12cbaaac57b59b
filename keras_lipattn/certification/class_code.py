"""Whether a layer or operation runs the code of its class, which its rule is about."""

import functools
import inspect
import types
from typing import Any

import keras
import numpy as np

# Methods that may be replaced without changing the function that a layer computes. Keras itself
# wraps `build` and `quantize` and sets `loss`, and a trace replaces `symbolic_call`.
HARMLESS = frozenset(
    {
        "__init__",
        "build",
        "compute_metrics",
        "compute_output_shape",
        "compute_output_spec",
        "from_config",
        "get_config",
        # Layers and callbacks that scale by it ask for it themselves.
        "graph_bound",
        "loss",
        "quantize",
        "symbolic_call",
    }
)

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_OF_KERAS = ("keras.src.activations.", "keras.src.layers.", "keras.src.ops.")


def changes_of(operation: Any) -> str:
    """How a layer or operation differs from its class; empty if it runs the code of its class."""
    cls = type(operation)
    if cls.__getattribute__ is not object.__getattribute__:
        return "its class overrides `__getattribute__`"
    replaced = [
        name
        for name, value in vars(operation).items()
        if name not in HARMLESS
        and callable(value)
        and _is_method(inspect.getattr_static(cls, name, None))
    ]
    names = ", ".join(sorted(replaced))
    return f"its `{names}` was replaced on the instance" if names else ""


def has_known_shapes(layer: keras.layers.Layer) -> bool:
    """Whether the shapes of the outputs and of the weights of a layer are those that Keras gives.

    A class from elsewhere may say something else about its outputs or build other weights, and an
    array may have taken the place of a weight.
    """
    methods = ("build", "compute_output_shape", "compute_output_spec")
    modules = [getattr(type(layer), name).__module__ for name in methods]
    own = all(module.startswith(("keras.src.", "keras_lipattn.")) for module in modules)
    return own and not any(map(_is_plain_array, vars(layer).values()))


def _is_plain_array(value: Any) -> bool:
    """Whether a value is an array that is no weight of Keras."""
    if isinstance(value, keras.Variable):
        return False
    return isinstance(value, np.ndarray) or keras.ops.is_tensor(value)


def overrides_call_operator(layer: keras.layers.Layer) -> bool:
    """Whether a layer runs code other than that of Keras and this package around its `call`."""
    return not type(layer).__call__.__module__.startswith(("keras.src.", "keras_lipattn."))


def operation_name(operation: Any) -> str:
    """Name of the class of an operation or layer of Keras; empty for any other code."""
    cls = type(operation)
    return (
        cls.__name__ if cls.__module__.startswith(_OF_KERAS) and not changes_of(operation) else ""
    )


def reads_arguments_alone(operation: Any, *, has_rule: bool) -> bool:
    """Whether the output of a call depends on nothing but its arguments and weights.

    Code from elsewhere may read any tensor that was there before, for instance an attribute of
    another layer. A rule vouches for the class of its layer, not for functions that it was given.
    """
    if not isinstance(operation, keras.layers.Layer):
        return bool(operation_name(operation))
    inner = operation._flatten_layers()
    known = has_rule or all(_is_known(one) for one in inner)
    return known and not any(_is_foreign(one) for layer in inner for one in vars(layer).items())


def _is_known(layer: keras.layers.Layer) -> bool:
    runs_functions = isinstance(layer, keras.layers.Lambda)
    return bool(operation_name(layer)) and not runs_functions


def _is_foreign(attribute: tuple[str, Any]) -> bool:
    name, value = attribute
    if name in HARMLESS or not isinstance(value, _FUNCTIONS):
        return False
    function = value
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or ""
    return not module.startswith(("keras.src.", "keras_lipattn."))


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, classmethod | staticmethod)
