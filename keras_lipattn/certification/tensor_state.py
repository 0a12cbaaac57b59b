"""What is known about a tensor of a traced model."""

import dataclasses
import enum
import math
from collections.abc import Mapping

import numpy as np

from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.linear_map import LinearMap
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

# Lowest and highest entry.
Interval = tuple[float, float]
ANYTHING: Interval = (-math.inf, math.inf)


class Kind(enum.Enum):
    """Whether a tensor changes when the certified inputs do."""

    # It changes with a certified input.
    PERTURBED = "perturbed"
    # It repeats the numbers of an integer input, which counts as a certified input unless it is
    # looked up in a table.
    INTEGER = "integer"
    # It stays as it is: a constant of the model, a mask, or what follows from those.
    FIXED = "fixed"
    # It stays as it is, and follows from an integer or string input.
    FROM_INTEGERS = "from integers"


@dataclasses.dataclass(frozen=True, eq=False)
class Enclosure:
    """The value of a tensor at the center of a local certificate, and how far it can be from it.

    Args:
        value: the tensor at the center, for one example, float64 where it is a float.
        radius: for every input in the ball, the tensor is within this distance of `value` in the
            2-norm of all entries, `rounding_error` included.
        rounding_error: how far `value` may be from the tensor of real arithmetic with the weights
            used at inference: their roundings, and those of the evaluation.
    """

    value: np.ndarray
    radius: float = 0.0
    rounding_error: float = 0.0

    @property
    def size(self) -> float:
        """2-norm of the value."""
        return float(np.linalg.norm(np.asarray(self.value, np.float64)))

    @property
    def range(self) -> TokenRange:
        """A ball that contains every token of the tensor."""
        # Numbers without an axis of their own are tokens of one entry.
        tokens = TokenRange.of_values(self.value if self.value.ndim > 1 else self.value[..., None])
        if not tokens.bounded:
            return tokens
        return TokenRange(tokens.radius + self.radius, tokens.center, tokens.largest + self.radius)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TensorState:
    """A tensor of a traced model.

    The first axis of a tensor that depends on the examples of a batch holds `fold` entries per
    example, next to each other: 1 is the usual batch axis, and more come from reshapes such as
    `(batch, heads, tokens, d)` to `(batch * heads, tokens, d)`. All other axes are in `shape`.

    Args:
        gain: its constant with respect to the certified inputs.
        published: the same, with the published bound for every attention layer.
        shape: sizes of the axes after the first one; the largest ones where they vary, `None` where
            nothing is known. For a tensor without examples (`fold=0`) the sizes of all axes.
        dynamic: for each of these axes whether the size varies from call to call.
        fold: entries of the first axis per example; 0 for a tensor that is the same for every
            batch, such as a constant of the model.
        dtype: its dtype, a string.
        kind: see `Kind`.
        integer_input: for `Kind.INTEGER`, the number of that input.
        range: where its tokens can be.
        anchor: a tensor from which this one follows by a linear map of the last axis plus a
            constant; `None` means the tensor itself.
        linear: that map.
        routes: pairs of an earlier tensor and a linear map from it to this one, the last linear
            layer first.
        interval: for a tensor that stays as it is, two numbers between which its entries are.
        function_of: what it is of which other tensor, where a later call may ask: the name of an
            activation, `"scaled"` for factors that are constants of the model, `"sign"` for a
            comparison with 0; the tensor; and the largest factor.
        values: its values where they are constants of the model.
        costs: for each row of the certificate its part of the logarithm of `gain`.
        enclosure: where it is near the input of a local certificate, `None` if not known.
    """

    gain: Gain
    published: Gain
    shape: tuple[int | None, ...]
    dynamic: tuple[bool, ...]
    fold: int = 1
    dtype: str = "float32"
    kind: Kind = Kind.PERTURBED
    integer_input: int | None = None
    range: TokenRange = dataclasses.field(default_factory=TokenRange)
    anchor: "TensorState | None" = None
    linear: LinearMap = None
    routes: "tuple[tuple[TensorState, LinearMap], ...]" = ()
    interval: Interval = ANYTHING
    function_of: "tuple[str, TensorState, float] | None" = None
    values: np.ndarray | None = None
    costs: Mapping[int, float] = dataclasses.field(default_factory=dict)
    enclosure: Enclosure | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether it stays as it is when the certified inputs change."""
        return self.kind in (Kind.FIXED, Kind.FROM_INTEGERS)

    @property
    def root(self) -> "TensorState":
        """The tensor which the linear map starts from."""
        return self if self.anchor is None else self.anchor

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape) + (self.fold > 0)

    @property
    def width(self) -> int | None:
        """Size of the last axis, `None` when it is not known or there is no axis."""
        return self.shape[-1] if self.shape and not self.dynamic[-1] else None

    @property
    def tokens(self) -> int | None:
        """Largest number of tokens: the product of all axes but the first and the last one."""
        return product(self.shape[:-1])

    @property
    def entries(self) -> int | None:
        """Largest number of entries after the first axis."""
        return product(self.shape)

    def repeated_range(self, width: int | None) -> TokenRange:
        """Where its tokens are once they are broadcast to `width` entries."""
        if self.width == width:
            return self.range
        if width is None:
            return TokenRange()
        if self.values is not None and (self.values.ndim == 0 or self.values.shape[-1] == 1):
            rows = self.values.reshape(-1, 1)
            return TokenRange.of_values(np.broadcast_to(rows, (len(rows), width)))
        if self.width != 1:
            return TokenRange()
        return TokenRange(SAFETY * math.sqrt(width) * self.range.largest, None, self.range.largest)

    def replace(self, **changes) -> "TensorState":
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)


def costs_after(gain: Gain, perturbed: list[TensorState], row: int) -> dict[int, float]:
    """Parts of the logarithm of the gain of a call, by row of the certificate; they sum to it.

    The costs of several inputs are weighted by their shares in the sum. The rest is the cost of the
    call itself, which includes that of having several branches.
    """
    if not math.isfinite(gain.log):
        return {}
    logs = [state.gain.log for state in perturbed]
    top = max(logs)
    if not math.isfinite(top):
        return {row: gain.log}
    weights = [math.exp(log - top) for log in logs]
    costs: dict[int, float] = {}
    brought = 0.0
    for state, weight in zip(perturbed, weights, strict=True):
        share = weight / sum(weights)
        brought += share * state.gain.log if weight > 0.0 else 0.0
        for index, cost in state.costs.items():
            costs[index] = costs.get(index, 0.0) + share * cost
    costs[row] = costs.get(row, 0.0) + gain.log - brought
    return costs


def product(sizes: tuple[int | None, ...]) -> int | None:
    """Product of the sizes, `None` when one of them is not known."""
    total = 1
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total
