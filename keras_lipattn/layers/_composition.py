"""The certificate of maps one after the other."""

import math

from keras_lipattn.bounds.lipschitz_bound import LipschitzBound


def composed(bounds):
    """Certified constant of maps in a row, from theirs: a `LipschitzBound` in the same norm."""
    reason = "; ".join(dict.fromkeys(bound.reason for bound in bounds if not bound.is_finite))
    value = math.inf if reason else math.prod(bound.value for bound in bounds)
    if not reason and math.isinf(value):
        reason = "the bound is larger than the largest float64"
    return LipschitzBound(
        value=value,
        norm=bounds[0].norm,
        kind="certified",
        theorem=", then ".join(dict.fromkeys(bound.theorem for bound in bounds)),
        reason=reason,
    )
