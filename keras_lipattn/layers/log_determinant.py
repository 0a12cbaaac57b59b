"""What the log-determinant of a Jacobian is returned as."""

from typing import Any, NamedTuple


class LogDeterminant(NamedTuple):
    """`log |det J|` of each example, and how far its expectation can be off.

    Attributes:
        value: Tensor `(B,)`. Derivatives flow through it.
        truncation_error: Certified bound of `|E[value] - log |det J||`, `(B,)`, in real arithmetic:
            what the terms left out can add up to. Zero for the exact and the unbiased method.
    """

    value: Any
    truncation_error: Any
