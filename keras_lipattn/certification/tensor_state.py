"""The state of a tensor of a traced model: how much it can change, and where it can be."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.linear_map import LinearMap
from keras_lipattn.certification.token_range import TokenRange
from keras_lipattn.linalg import SAFETY

# Lowest and highest entry.
Interval = tuple[float, float]
ANYTHING: Interval = (-math.inf, math.inf)


class Kind(enum.Enum):
    """How a tensor depends on the inputs of the model.

    Attributes:
        PERTURBED: it changes with a certified input.
        INTEGER: it contains the entries of an integer input, which is a certified input unless it
            is looked up in a table.
        FIXED: it does not change: a constant of the model, a mask, or a function of these.
        FROM_INTEGERS: it does not change, and is a function of an integer or string input.

    Example:

    >>> from keras_lipattn.certification import Kind
    >>> [kind.value for kind in Kind]
    ['perturbed', 'integer', 'fixed', 'from integers']
    """

    PERTURBED = "perturbed"
    INTEGER = "integer"
    FIXED = "fixed"
    FROM_INTEGERS = "from integers"


@dataclasses.dataclass(frozen=True, eq=False)
class Enclosure:
    """The value of a tensor at the center of a local certificate, and a ball around it.

    Args:
        value: the tensor at the center, for one example; floats are float64.
        radius: for every input in the ball of the certificate, the tensor is within this distance
            of `value` in the 2-norm of all entries, including `rounding_error`.
        rounding_error: upper bound of the 2-norm distance from `value` to the tensor in real
            arithmetic with the weights used at inference.
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
        # A scalar per example is a token with one entry.
        tokens = TokenRange.of_values(self.value if self.value.ndim > 1 else self.value[..., None])
        if not tokens.bounded:
            return tokens
        return TokenRange(tokens.radius + self.radius, tokens.center, tokens.largest + self.radius)


@dataclasses.dataclass(frozen=True, eq=False)
class Activated:
    """A tensor as `f(root @ before) @ after` plus a constant, for functions `f` of single entries.

    Args:
        root: an earlier tensor.
        before: a matrix.
        slopes: lower and upper bound of the slopes of the functions.
        after: linear map of the last axis.
    """

    root: "TensorState"
    before: np.ndarray
    slopes: tuple[float, float]
    after: LinearMap = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TensorState:
    """A tensor of a traced model.

    The first axis of a tensor with a batch axis holds `fold` consecutive entries per example: 1 for
    the usual batch axis, more after reshapes such as `(batch, heads, tokens, d)` to
    `(batch * heads, tokens, d)`. All other axes are in `shape`.

    Args:
        gain: Lipschitz constant of the tensor with respect to the certified inputs.
        published: the gain with the published bound for every attention layer.
        shape: sizes of the axes after the first one: the largest ones where they vary, `None` where
            they are not known. For a tensor without a batch axis (`fold=0`), sizes of all axes.
        dynamic: for each of these axes, whether the size varies from call to call.
        fold: entries of the first axis per example; 0 for a tensor that is the same for every
            batch, such as a constant of the model.
        dtype: its dtype, a string.
        kind: see `Kind`.
        integer_input: for `Kind.INTEGER`, the number of that input.
        range: where its tokens can be.
        anchor: a tensor of which this one is a linear map of the last axis plus a constant; `None`
            means the tensor itself.
        linear: that map.
        routes: pairs of an earlier tensor and a linear map from it to this one, the last linear
            layer first.
        activated: the tensor as a perceptron of an earlier one, `None` if it is none.
        interval: for a fixed tensor, lower and upper bound of its entries.
        function_of: for rules of later calls, a name, a tensor and a number: this tensor is the
            activation of that name of the other tensor; or its product with constants of the model
            of at most that size (`"scaled"`); or its comparison with 0 (`"sign"`).
        values: its values, for constants of the model.
        costs: for each row of the certificate, its part in the logarithm of `gain`.
        enclosure: its value in a local certificate, `None` if not known.
        others: its states in other norms than that of the certificate, see `OtherNorms`.

    Example:

    >>> class Shifted(keras.layers.Layer):
    ...     def call(self, x):
    ...         return x + 1.0
    >>> @keras_lipattn.register_rule(Shifted)
    ... def shifted(layer, call):
    ...     print(call.state.shape, call.state.kind.value, call.state.range.radius)
    ...     return 1.0
    >>> inputs = keras.Input((6, 8))
    >>> model = keras.Model(inputs, Shifted()(inputs))
    >>> certificate = keras_lipattn.certify(model, input_radius=2.0)
    (6, 8) perturbed 2.0
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
    activated: Activated | None = None
    interval: Interval = ANYTHING
    function_of: "tuple[str, TensorState, float] | None" = None
    values: np.ndarray | None = None
    costs: Mapping[int, float] = dataclasses.field(default_factory=dict)
    enclosure: Enclosure | None = None
    others: "Mapping[str, TensorState]" = dataclasses.field(default_factory=dict)

    @property
    def layout(self) -> dict[str, Any]:
        """Its fields `shape`, `dynamic`, `fold` and `dtype`."""
        return {name: getattr(self, name) for name in ("shape", "dynamic", "fold", "dtype")}

    @property
    def is_fixed(self) -> bool:
        """Whether it does not change with the certified inputs."""
        return self.kind in (Kind.FIXED, Kind.FROM_INTEGERS)

    @property
    def root(self) -> "TensorState":
        """The input of the linear map: `anchor`, or the tensor itself."""
        return self if self.anchor is None else self.anchor

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape) + (self.fold > 0)

    @property
    def width(self) -> int | None:
        """Size of the last axis, `None` if it is not known or there is no axis."""
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
        """The range of its tokens after broadcasting to `width` entries."""
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
        """A copy with other fields, without the states in other norms unless they are given."""
        return dataclasses.replace(self, **{"others": {}, **changes})

    def without_maps(self) -> "TensorState":
        """A copy that does not know of which tensors it is a linear map or a perceptron."""
        others = {norm: state.without_maps() for norm, state in self.others.items()}
        return self.replace(anchor=None, linear=None, routes=(), activated=None, others=others)


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
