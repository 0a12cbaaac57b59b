"""Where the tokens of a tensor can be."""

import dataclasses
import math

import numpy as np

from keras_lipattn.linalg import SAFETY


@dataclasses.dataclass(frozen=True)
class Domain:
    """A ball which contains every token of a tensor, and a bound of its entries.

    What linear maps made of a ball is remembered: the tokens are among `centre + v @ maps[0] @
    maps[1] ...` with `|v| <= source` too.

    Args:
        radius: Euclidean radius of the ball, `inf` when the tokens are not bounded.
        centre: array of shape `(last axis,)`, or `None` for the origin.
        largest: upper bound of the largest absolute entry.
        maps: matrices, or diagonals of shape `(d,)`; empty when nothing more is known.
        source: radius of the ball which `maps` were applied to.
    """

    radius: float = math.inf
    centre: np.ndarray | None = None
    largest: float = math.inf
    maps: tuple[np.ndarray, ...] = ()
    source: float = math.inf

    def __post_init__(self):
        if not self.largest <= self.reach:
            object.__setattr__(self, "largest", self.reach)

    @property
    def bounded(self) -> bool:
        """Whether the tokens stay within some ball."""
        return math.isfinite(self.radius)

    @property
    def reach(self) -> float:
        """Largest absolute entry that the ball allows."""
        offset = 0.0 if self.centre is None else float(np.abs(self.centre).max(initial=0.0))
        return self.radius + offset

    @property
    def outer_radius(self) -> float:
        """Radius of a ball around the origin which contains the tokens."""
        return self.radius + (0.0 if self.centre is None else float(np.linalg.norm(self.centre)))

    @classmethod
    def of_values(cls, values: np.ndarray) -> "Domain":
        """The domain of known tokens, an array of shape `(..., d)`."""
        values = np.asarray(values, np.float64)
        if not np.isfinite(values).all() or values.size == 0:
            return cls()
        tokens = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
        centre = tokens.mean(axis=0)
        radius = float(np.linalg.norm(tokens - centre, axis=1).max())
        return cls(radius, centre, float(np.abs(tokens).max()))

    @classmethod
    def of_entries(cls, low: float, high: float, width: int) -> "Domain":
        """All tokens of `width` entries in `[low, high]`."""
        middle = 0.5 * (low + high)
        centre = np.full(width, middle) if middle else None
        return cls(math.sqrt(width) * 0.5 * (high - low), centre, max(abs(low), abs(high)))

    def around_origin(self) -> "Domain":
        """The same tokens in a ball around the origin, for maps which move the centre."""
        return Domain(self.outer_radius, None, self.largest)

    def including(self, point: np.ndarray) -> "Domain":
        """The smallest ball that contains this one and a point."""
        centre = np.zeros(point.shape) if self.centre is None else self.centre
        way = point - centre
        distance = float(np.linalg.norm(way))
        if not self.bounded or distance <= self.radius:
            return self
        farther = 0.5 * (distance - self.radius)
        largest = max(self.largest, float(np.abs(point).max(initial=0.0)))
        return Domain(
            SAFETY * 0.5 * (distance + self.radius), centre + way * (farther / distance), largest
        )

    def scaled(self, factor: float) -> "Domain":
        """The domain of `factor * x`."""
        centre = None if self.centre is None else factor * self.centre
        if factor == 0.0:
            return Domain(0.0, centre if self.bounded else None, 0.0)
        return Domain(abs(factor) * self.radius, centre, abs(factor) * self.largest)

    def plus(self, other: "Domain") -> "Domain":
        """The domain of `x + y`."""
        if self.centre is None or other.centre is None:
            centre = self.centre if other.centre is None else other.centre
        elif self.centre.shape == other.centre.shape:
            centre = self.centre + other.centre
        else:
            return self.around_origin().plus(other.around_origin())
        return Domain(self.radius + other.radius, centre, self.largest + other.largest)

    def smaller(self, other: "Domain") -> "Domain":
        """The smaller of two valid domains of the same tensor."""
        best = other if other.radius < self.radius else self
        return dataclasses.replace(best, largest=min(self.largest, other.largest))

    def axes(self, width: int) -> np.ndarray:
        """A matrix `(r, width)`: every token is `centre + v @ axes` with `|v| <= 1`."""
        if not self.maps:
            return self.radius * np.eye(width)
        product = self.maps[0]
        for matrix in self.maps[1:]:
            product = product * matrix if matrix.ndim == 1 else _rows(product) @ matrix
        return self.source * _rows(product)


def _rows(linear: np.ndarray) -> np.ndarray:
    return np.diag(linear) if linear.ndim == 1 else linear
