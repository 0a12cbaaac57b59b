"""Whether a layer or operation runs the code of its class, which its rule is about."""

import inspect
from typing import Any

import keras

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
        "loss",
        "quantize",
        "symbolic_call",
    }
)

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


def overrides_call_operator(layer: keras.layers.Layer) -> bool:
    """Whether a layer runs code other than that of Keras and this package around its `call`."""
    return not type(layer).__call__.__module__.startswith(("keras.src.", "keras_lipattn."))


def operation_name(operation: Any) -> str:
    """Name of the class of an operation or layer of Keras; empty for any other code."""
    cls = type(operation)
    return (
        cls.__name__ if cls.__module__.startswith(_OF_KERAS) and not changes_of(operation) else ""
    )


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, classmethod | staticmethod)
