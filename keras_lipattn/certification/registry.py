"""The registry of rules for layer classes and operations."""

import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_lipattn.certification.class_code import HARMLESS, changes_of, operation_name
from keras_lipattn.certification.layer_call import LayerCall
from keras_lipattn.certification.maps import LipschitzMap

Rule = Callable[[Any, LayerCall], LipschitzMap | float]

LAYER_RULES: dict[type, tuple[Rule, bool]] = {}
OPERATION_RULES: dict[str, Rule] = {}
_own_bound: list[Rule] = []

# A class that defines one of these methods states the constant of its code.
_STATES_CONSTANT = frozenset({"bound", "certified", "lipschitz", "matrices"})


def register_rule(*layer_classes: type, subclasses: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for a layer class, as a decorator.

    A rule is a function of a layer and a `LayerCall`. It returns one of the maps of
    `keras_lipattn.certification`, or only a number: a Lipschitz constant of the call in the norm
    `call.norm`, at inference, for the current weights, on all inputs or on those in
    `call.state.range`. Where `call.training` is true, the model calls the layer as in training.
    A later rule for the same class replaces an earlier one.

    Args:
        *layer_classes: subclasses of `keras.layers.Layer`.
        subclasses: whether the rule also holds for subclasses that override `call` or other
            methods. By default it does not.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        ValueError: if a class is not a subclass of `keras.layers.Layer`.

    Example:

    >>> import keras
    >>> from keras_lipattn.certification import Elementwise, certify, register_rule
    >>> class Halved(keras.layers.Layer):
    ...     def call(self, x):
    ...         return 0.5 * keras.ops.tanh(x)
    >>> @register_rule(Halved)
    ... def halved(layer, call):
    ...     return Elementwise(constant=0.5, value_at_zero=0.0, theorem="largest slope")
    >>> inputs = keras.Input((16, 32))
    >>> certificate = certify(keras.Model(inputs, Halved()(inputs)))
    >>> round(certificate.total, 6)
    0.5

    Reference: docs/certification.md, "A rule for a layer of your own".
    """
    if not layer_classes:
        raise ValueError("`layer_classes` must name at least one class. Received: none")
    for layer_class in layer_classes:
        if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
            raise ValueError(
                "`layer_classes` must be subclasses of `keras.layers.Layer`. "
                f"Received: {layer_class}"
            )

    def decorate(rule: Rule) -> Rule:
        for layer_class in layer_classes:
            LAYER_RULES[layer_class] = rule, subclasses
        return rule

    return decorate


def register_operation(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for nodes of `keras.ops`, by the names of their classes."""

    def decorate(rule: Rule) -> Rule:
        for name in names:
            OPERATION_RULES[name] = rule
        return rule

    return decorate


def register_own_bound(rule: Rule) -> Rule:
    """Registers the rule for layers that have a method `lipschitz` and no other rule."""
    _own_bound[:] = [rule]
    return rule


def find_rule(operation: Any) -> tuple[Rule | None, str]:
    """The rule for a layer or a node of `keras.ops`.

    Returns:
        The rule and an empty string, or `None` and the reason why there is no rule.
    """
    cls = type(operation)
    if not isinstance(operation, keras.layers.Layer):
        rule = OPERATION_RULES.get(operation_name(operation))
        return rule, "" if rule else "this operation has no rule"
    changes = changes_of(operation)
    if changes:
        return None, changes
    overridden: list[str] = []
    inherited: str | None = None
    for ancestor in cls.__mro__:
        if inherited is None and not _STATES_CONSTANT.isdisjoint(vars(ancestor)):
            # Its constant is not about code that a subclass overrides.
            later = sorted(name for name in overridden if _is_code_of(ancestor, name))
            inherited = (
                f"it overrides `{', '.join(later)}` of {ancestor.__name__}, whose constant it "
                "inherits"
                if later and ancestor not in LAYER_RULES
                else ""
            )
        if ancestor in LAYER_RULES:
            rule, subclasses = LAYER_RULES[ancestor]
            if overridden and not subclasses:
                return None, (
                    f"it overrides `{', '.join(sorted(overridden))}` of {ancestor.__name__}, so "
                    "the rule for that class does not apply"
                )
            if inherited and rule.__module__.startswith("keras_lipattn."):
                return None, inherited
            return rule, ""
        overridden += [
            name
            for name, value in vars(ancestor).items()
            if name not in HARMLESS
            and not (name.startswith("__") and name != "__call__")
            and not name.startswith("_abc_")
            and (callable(value) or isinstance(value, property | classmethod | staticmethod))
            and _is_inherited(cls, ancestor, name)
        ]
    if callable(getattr(operation, "lipschitz", None)):
        return (None, inherited) if inherited else (_own_bound[0], "")
    return None, "no rule is registered for it"


def _is_code_of(cls: type, name: str) -> bool:
    """Whether a class has this method, and not only as every layer of Keras has it."""
    found = inspect.getattr_static(cls, name, None)
    return found not in (None, inspect.getattr_static(keras.layers.Layer, name, None))


def _is_inherited(cls: type, ancestor: type, name: str) -> bool:
    """Whether a class above `ancestor` defines the name as well."""
    above = cls.__mro__[cls.__mro__.index(ancestor) + 1 :]
    return any(name in vars(other) for other in above if other is not object)
