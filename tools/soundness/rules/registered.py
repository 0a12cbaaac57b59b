"""What `certify` has rules for."""

from keras_lipattn.certify.registry import _layer_rules as layer_rules
from keras_lipattn.certify.registry import _operation_rules as operation_rules

__all__ = ["layer_rules", "operation_rules"]
