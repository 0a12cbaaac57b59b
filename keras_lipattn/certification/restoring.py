"""Context managers for calling a model on symbolic tensors without changing it."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import keras
from keras.src.ops import core

from keras_lipattn.certification.keras_models import recorded_operations
from keras_lipattn.certification.trace import TraceError


@contextlib.contextmanager
def restored(model: keras.Model) -> Iterator[None]:
    """Restores everything that a symbolic call changes on a model and its inner layers."""
    layers = model._flatten_layers()
    operations = {id(one): one for one in layers} | recorded_operations(model)
    attributes = [dict(vars(inner)) for inner in layers]
    lists = [
        (kept, list(kept))
        for inner in operations.values()
        for kept in (inner._inbound_nodes, inner._outbound_nodes)
    ]
    lists += [(inner._losses, list(inner._losses)) for inner in layers]
    loss_ids = [(inner._loss_ids, set(inner._loss_ids)) for inner in layers]
    for inner in layers:
        if not inner.built:
            vars(inner)["build"] = _refuse_to_build(inner)
    try:
        yield
    finally:
        for inner, before in zip(layers, attributes, strict=True):
            now = vars(inner)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        for kept, before in lists:
            kept[:] = before
        for kept, before in loss_ids:
            kept.clear()
            kept.update(before)


# Operators of two operands.
_OPERATORS = (
    *("__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"),
    *("__matmul__", "__lt__", "__le__", "__gt__", "__ge__"),
)


@contextlib.contextmanager
def conversions_as_on_data() -> Iterator[None]:
    """Makes conversions to the dtype that a tensor already has return the tensor itself.

    This is what they do on data. On symbols, Keras returns a new tensor without the mask.
    """
    classes = (core.Cast, core.ConvertToTensor)
    originals = [vars(one).get("symbolic_call") for one in classes]

    def symbolic_call(self, x):
        if self.dtype is None or keras.backend.standardize_dtype(self.dtype) == x.dtype:
            return x
        return keras.Operation.symbolic_call(self, x)

    for one in classes:
        one.symbolic_call = symbolic_call
    try:
        yield
    finally:
        for one, original in zip(classes, originals, strict=True):
            if original is None:
                del one.symbolic_call
            else:
                one.symbolic_call = original


@contextlib.contextmanager
def weights_before_symbols() -> Iterator[None]:
    """Makes `weight * x` run on a symbol `x`, as `x * weight` does.

    On symbols, the operators of a variable raise an error instead of leaving the operation to the
    symbol.
    """
    kind = next(one for one in keras.Variable.__mro__ if "__mul__" in vars(one))
    originals = {name: vars(kind)[name] for name in _OPERATORS}

    def leaving(original):
        @functools.wraps(original)
        def operator(weight, other):
            if isinstance(other, keras.KerasTensor):
                return NotImplemented
            return original(weight, other)

        return operator

    for name, original in originals.items():
        setattr(kind, name, leaving(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(kind, name, original)


@contextlib.contextmanager
def weights_as_they_are(refusal: str, is_checked: Callable[[], bool]) -> Iterator[None]:
    """Makes a scope that gives variables other values, as `stateless_call` does, raise an error.

    Rules read the values of variables after the call, when such a scope has ended.

    Args:
        refusal: message of the `TraceError`.
        is_checked: whether to raise it now.
    """
    enter = keras.StatelessScope.__enter__

    def checked(scope):
        if scope.state_mapping and is_checked():
            raise TraceError(refusal)
        return enter(scope)

    keras.StatelessScope.__enter__ = checked
    try:
        yield
    finally:
        keras.StatelessScope.__enter__ = enter


def _refuse_to_build(layer: keras.layers.Layer):
    def build(*args, **kwargs):
        raise TraceError(f"layer {layer.name!r} inside it is not built")

    return build
