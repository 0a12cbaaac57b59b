"""The value object for a Lipschitz constant: its norm, its kind and its source."""

import dataclasses
import math

NORMS = {
    "l2": "2-norm of all entries",
    "token": "largest Euclidean norm of a token",
    "linf": "largest absolute entry",
}
KINDS = {
    "certified": "an upper bound",
    "running": "the bound's formula fed with running norms, no guarantee",
    "lower": "measured, the true constant is at least this",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LipschitzBound:
    """A number for a Lipschitz constant, with its norm, its kind and its source.

    Args:
        value: the number, `inf` when no finite one is known. Never NaN.
        norm: norm of inputs and outputs: `"l2"` (2-norm of all entries), `"token"` (largest
            Euclidean norm of a token) or `"linf"` (largest absolute entry).
        kind: `"certified"` (an upper bound for inference, a fixed mask, at most the stated
            number of tokens, in real arithmetic with the weights used at inference), `"running"`
            (the same formula with running norms, no guarantee) or `"lower"` (measured).
        theorem: the theorem that gives the number, for instance `"Theorem 3.B"`.
        reason: why no finite number is known. Required when `value` is `inf`.
        published: the bound of Kim, Papamakarios and Mnih for the same quantity, `inf`
            when it was not evaluated.

    Raises:
        ValueError: if `value` is NaN or negative, if `norm` or `kind` is unknown, or if an
            infinite `value` comes without a reason.

    Example:

    >>> bound = LipschitzBound(value=2.5, norm="l2", kind="certified", theorem="Theorem 3.B")
    >>> float(bound)
    2.5
    >>> print(bound)
    2.5 (certified, 2-norm of all entries, Theorem 3.B)
    """

    value: float
    norm: str
    kind: str
    theorem: str
    reason: str = ""
    published: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "published", float(self.published))
        if not self.value >= 0.0:
            raise ValueError(
                f"`value` must be a number that is not negative. Received: value={self.value}"
            )
        if not self.published >= 0.0:
            raise ValueError(
                "`published` must be a number that is not negative. "
                f"Received: published={self.published}"
            )
        if self.norm not in NORMS:
            raise ValueError(f"`norm` must be one of {sorted(NORMS)}. Received: norm={self.norm!r}")
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {sorted(KINDS)}. Received: kind={self.kind!r}")
        if math.isinf(self.value) and not self.reason:
            raise ValueError(
                "An infinite bound needs a `reason`. "
                f"Received: value={self.value}, reason={self.reason!r}"
            )

    @property
    def is_finite(self) -> bool:
        """Whether the value is finite."""
        return math.isfinite(self.value)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if not self.is_finite:
            return f"inf ({self.kind}, {NORMS[self.norm]}): {self.reason}"
        parts = [self.kind, NORMS[self.norm]]
        if self.theorem:
            parts.append(self.theorem)
        if math.isfinite(self.published):
            parts.append(f"published bound {self.published:.6g}")
        if self.reason:
            parts.append(self.reason)
        return f"{self.value:.6g} ({', '.join(parts)})"
