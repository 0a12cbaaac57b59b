"""The layers and operations with a rule."""

from keras_lipattn.certification.registry import _layer_rules
from keras_lipattn.certification.registry import _operation_rules as operation_rules
from keras_lipattn.certification.tracing import _expansions

# Wrappers have an expansion instead of a rule.
layer_rules = {**_layer_rules, **_expansions}

__all__ = ["layer_rules", "operation_rules"]
