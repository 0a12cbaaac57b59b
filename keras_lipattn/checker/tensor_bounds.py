"""Bounds of one tensor of a served graph: how much it changes, and where its tokens are.

A change is measured relative to a change of the only certified input. Tokens are the positions
along all axes but the last one.
"""

import dataclasses
import math

import numpy as np

from keras_lipattn.bounds.layer_constants import conversion_constant
from keras_lipattn.linalg import SAFETY, fast_operator_norm

# Norms whose bounds may improve those of a certificate in a norm.
OTHER_NORMS = {"l2": ("token",), "token": ("l2",), "linf": ("token", "l2")}
_BY_SIZE = ("linf", "token", "l2")
# A map of the last axis: a matrix `(d_in, d_out)`, its diagonal `(d,)`, or `None`, the identity.
Linear = np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Ball:
    """A ball that holds every token, and the linear maps applied to an earlier ball.

    Args:
        radius: Its radius.
        center: Its center `(d,)`, or `None` for the origin.
        largest: Upper bound of the absolute entries of the tokens.
        maps: A token is `center + v @ maps[0] @ ...` for some `|v| <= source`; may be empty.
        source: The radius of the earlier ball.
    """

    radius: float = math.inf
    center: np.ndarray | None = None
    largest: float = math.inf
    maps: tuple[np.ndarray, ...] = ()
    source: float = math.inf

    def __post_init__(self):
        offset = 0.0 if self.center is None else float(np.abs(self.center).max(initial=0.0))
        if not self.largest <= self.radius + offset:
            object.__setattr__(self, "largest", self.radius + offset)

    @property
    def reach(self) -> float:
        """Largest norm of a token."""
        return self.radius + (0.0 if self.center is None else float(np.linalg.norm(self.center)))

    def around_origin(self) -> "Ball":
        """A ball around the origin with the same tokens in it."""
        return Ball(self.reach, None, self.largest)

    def shifted(self, table: np.ndarray | None) -> "Ball":
        """The ball after the addition of a row, or of one of several rows."""
        if table is None:
            return self
        rows = np.atleast_2d(np.asarray(table, np.float64))
        middle = rows.mean(axis=0)
        spread = float(np.linalg.norm(rows - middle, axis=1).max())
        center = middle if self.center is None else self.center + middle
        radius, largest = self.radius + spread, self.largest + float(np.abs(rows).max())
        if spread > 0.0:
            return Ball(radius, center, largest)
        return dataclasses.replace(self, radius=radius, center=center, largest=largest)

    def mapped(self, linear: Linear, norm: float) -> "Ball":
        """The ball after a linear map of this spectral norm."""
        if not math.isfinite(self.radius):
            return Ball()
        center = self.center if self.center is None else apply(self.center, linear)
        maps = self.maps if linear is None else (*self.maps, linear)
        source = self.source if self.maps else self.radius
        return Ball(self.radius * norm if norm else 0.0, center, math.inf, maps, source)

    def plus(self, other: "Ball") -> "Ball":
        """The ball of the sums of two tokens."""
        centers = [ball.center for ball in (self, other) if ball.center is not None]
        center = sum(centers[1:], centers[0]) if centers else None
        return Ball(self.radius + other.radius, center, self.largest + other.largest)

    def including(self, point: np.ndarray) -> "Ball":
        """The smallest ball that also holds this point."""
        center = np.zeros(point.shape) if self.center is None else self.center
        distance = float(np.linalg.norm(point - center))
        if not math.isfinite(self.radius) or distance <= self.radius:
            return self
        step = 0.5 * (distance - self.radius) / distance
        largest = max(self.largest, float(np.abs(point).max(initial=0.0)))
        radius = SAFETY * 0.5 * (distance + self.radius)
        return Ball(radius, center + (point - center) * step, largest)

    def smaller(self, other: "Ball") -> "Ball":
        """The smaller of two balls with the same tokens in them."""
        best = other if other.radius < self.radius else self
        return dataclasses.replace(best, largest=min(self.largest, other.largest))

    def axes(self, width: int) -> np.ndarray:
        """A matrix `(r, width)`: every token is `center + v @ axes` with `|v| <= 1`."""
        if not self.maps:
            return self.radius * np.eye(width)
        product = full(self.maps[0], self.maps[0].shape[-1])
        for linear in self.maps[1:]:
            product = apply(product, linear)
        return self.source * product

    @classmethod
    def of_entries(cls, low: float, high: float, width: int) -> "Ball":
        """All tokens whose entries are between two numbers."""
        middle = 0.5 * (low + high)
        center = np.full(width, middle) if middle else None
        return cls(math.sqrt(width) * 0.5 * (high - low), center, max(abs(low), abs(high)))


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of a tensor.

    Args:
        log: Logarithm of its Lipschitz constant in the norm of the certificate.
        shape: Its sizes without the batch axis, the largest ones where they vary.
        varies: For each of them, whether it varies.
        ball: Where its tokens are.
        anchor: A tensor that this one is a linear map of, token by token, up to a shift.
        linear: That map.
        routes: Pairs of a tensor and a linear map that gives this one from it.
    """

    log: float
    shape: tuple[int, ...]
    varies: tuple[bool, ...]
    ball: Ball = dataclasses.field(default_factory=Ball)
    anchor: "Bounds | None" = None
    linear: Linear = None
    routes: "tuple[tuple[Bounds, Linear], ...]" = ()

    @property
    def root(self) -> "Bounds":
        """The anchor, or the tensor itself."""
        return self if self.anchor is None else self.anchor

    @property
    def width(self) -> int:
        """Size of the last axis."""
        return self.shape[-1]

    @property
    def tokens(self) -> int:
        """Largest number of tokens."""
        return math.prod(self.shape[:-1])

    def reshaped(self, other: "Bounds") -> "Bounds":
        """The same bounds with the sizes of another tensor."""
        return dataclasses.replace(self, shape=other.shape, varies=other.varies)


def log_of(constant: float) -> float:
    """Logarithm of a constant, `-inf` for 0."""
    return math.log(constant) if constant > 0.0 else -math.inf


def summed(logs: list[float]) -> float:
    """Logarithm of the sum of constants."""
    top = max(logs)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(log - top) for log in logs))


def apply(rows: np.ndarray, linear: Linear) -> np.ndarray:
    """Rows after a linear map."""
    if linear is None:
        return rows
    return rows * linear if linear.ndim == 1 else rows @ linear


def full(linear: Linear, width: int) -> np.ndarray:
    """A linear map as a matrix; `width` is the last axis of its output."""
    if linear is None:
        return np.eye(width)
    return np.diag(linear) if linear.ndim == 1 else linear


def compose(first: Linear, second: Linear) -> Linear:
    """One linear map after another."""
    if first is None or second is None:
        return second if first is None else first
    if first.ndim == 1 and second.ndim == 2:
        return first[:, None] * second
    return apply(first, second)


def constant_of(linear: Linear, norm: str) -> float:
    """Lipschitz constant of a linear map of every token."""
    if linear is None:
        return 1.0
    if linear.ndim == 1:
        return float(np.abs(linear).max())
    if norm == "linf":
        return SAFETY * float(np.abs(linear).sum(axis=0).max())
    return SAFETY * fast_operator_norm(linear)


def mapped(
    state: Bounds,
    linear: Linear,
    shift: np.ndarray | None,
    norm: str,
    *,
    constant: float | None = None,
    spectral: float | None = None,
) -> Bounds:
    """Bounds after a linear map of every token and a shift.

    Args:
        state: Bounds of the input.
        linear: The map.
        shift: What is added to a token, a row or a row for each token.
        norm: Norm of the certificate.
        constant: Constant of the map in that norm, if known.
        spectral: Spectral norm of the map, if known.
    """
    if constant is None:
        constant = constant_of(linear, norm)
    if spectral is None:
        spectral = constant if norm != "linf" else constant_of(linear, "l2")
    log, merged = state.log + log_of(constant), compose(state.linear, linear)
    if state.linear is not None and linear is not None:
        log = min(log, state.root.log + log_of(constant_of(merged, norm)))
    width = state.width if linear is None else linear.shape[-1]
    return Bounds(
        log,
        (*state.shape[:-1], width),
        state.varies,
        state.ball.mapped(linear, spectral).shifted(shift),
        state.root,
        merged,
        ((state, linear), (state.root, merged)),
    )


def elementwise(
    state: Bounds, slope: float, at_zero: float, limits: tuple[float, float] | None
) -> Bounds:
    """Bounds after a function of single entries.

    Args:
        state: Bounds of the input.
        slope: Its largest slope.
        at_zero: Upper bound of its absolute value at 0.
        limits: An interval with all its values, or `None`.
    """
    ball = Ball() if limits is None else Ball.of_entries(*limits, state.width)
    if math.isfinite(state.ball.radius):
        reach = slope * state.ball.reach + math.sqrt(state.width) * at_zero
        ball = ball.smaller(Ball(reach, None, slope * state.ball.largest + at_zero))
    return Bounds(state.log + log_of(slope), state.shape, state.varies, ball)


def combined(states: list[Bounds], coefficients: list[float], norm: str) -> Bounds:
    """Bounds of a linear combination of tensors of one shape."""
    groups: dict[int, list[tuple[Bounds, float]]] = {}
    ball = None
    for state, coefficient in zip(states, coefficients, strict=True):
        groups.setdefault(id(state.root), []).append((state, coefficient))
        scale = _scale(coefficient, state.width)
        term = state.ball.mapped(scale, abs(coefficient))
        ball = term if ball is None else ball.plus(term)
    logs, root, linear = [], None, None
    for members in groups.values():
        log = summed([state.log + log_of(abs(scale)) for state, scale in members])
        maps = [
            full(compose(state.linear, _scale(scale, state.width)), state.width)
            if len(members) > 1
            else compose(state.linear, _scale(scale, state.width))
            for state, scale in members
        ]
        total = _total(members, maps)
        if len(members) > 1:
            log = min(log, members[0][0].root.log + log_of(constant_of(total, norm)))
        if len(groups) == 1:
            root, linear = members[0][0].root, total
        logs.append(log)
    return Bounds(summed(logs), states[0].shape, states[0].varies, ball or Ball(), root, linear)


def _total(members: list[tuple[Bounds, float]], maps: list[Linear]) -> Linear:
    """The sum of maps; of diagonals it stays a diagonal."""
    if len(maps) == 1:
        return maps[0]
    diagonals = [compose(state.linear, _scale(scale, state.width)) for state, scale in members]
    width = members[0][0].width
    if all(one is None or one.ndim == 1 for one in diagonals):
        return sum(np.ones(width) if one is None else one for one in diagonals)  # type: ignore
    return sum(full(one, width) for one in diagonals)  # type: ignore


def _scale(coefficient: float, width: int) -> Linear:
    return None if coefficient == 1.0 else np.full(width, float(coefficient))


def converted(state: Bounds, source: str, target: str) -> Bounds:
    """Bounds in another norm: those in one norm, times the largest ratio of the two."""
    if _BY_SIZE.index(target) <= _BY_SIZE.index(source):
        return state
    tokens = state.tokens if target == "l2" else 1
    width = (state.shape[-1] if state.shape else 1) if source == "linf" else 1
    price = conversion_constant(source, target, tokens=tokens, width=width)
    return dataclasses.replace(state, log=state.log + log_of(price))


def relaxed(family: dict[str, Bounds]) -> dict[str, Bounds]:
    """Bounds of one tensor by norm, each at most another one at its price."""
    # From the largest norm down, where steps are free, and then up again.
    for norms in (_BY_SIZE[::-1], _BY_SIZE):
        for source in norms:
            for target in norms:
                if source != target and source in family and target in family:
                    log = converted(family[source], source, target).log
                    own = family[target]
                    family[target] = dataclasses.replace(own, log=min(own.log, log))
    return family
