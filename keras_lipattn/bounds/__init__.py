"""The theorems as pure functions: from numbers and kernels to numbers."""

from keras_lipattn.bounds.head_scaling import frobenius_scaling
from keras_lipattn.bounds.lipschitz_bound import LipschitzBound
from keras_lipattn.bounds.multihead import (
    bound_linf,
    certified_layer_bound,
    layer_matrices,
    published_layer_bound,
    running_layer_bound,
    split_bound,
)
from keras_lipattn.bounds.unit_head import (
    UnitBound,
    published_head_bound,
    unit_head_bound,
)
from keras_lipattn.bounds.unit_head_lemmas import phi_inv, s_star
from keras_lipattn.bounds.visible_pairs import Cliques, mask_cliques, mask_degrees

__all__ = [
    "Cliques",
    "LipschitzBound",
    "UnitBound",
    "bound_linf",
    "certified_layer_bound",
    "frobenius_scaling",
    "layer_matrices",
    "mask_cliques",
    "mask_degrees",
    "phi_inv",
    "published_head_bound",
    "published_layer_bound",
    "running_layer_bound",
    "s_star",
    "split_bound",
    "unit_head_bound",
]
