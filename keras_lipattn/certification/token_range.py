"""The range of a tensor: a ball that contains its tokens."""

import dataclasses
import math

import numpy as np

from keras_lipattn.linalg import SAFETY


@dataclasses.dataclass(frozen=True)
class TokenRange:
    """A ball that contains every token of a tensor, with a bound of its entries.

    Linear maps applied to an earlier ball are stored, which gives an ellipsoid: each token is also
    `center + v @ maps[0] @ maps[1] ...` for some `|v| <= source`.

    Args:
        radius: Euclidean radius of the ball, `inf` when the tokens are not bounded.
        center: array of shape `(last axis,)`, or `None` for the origin.
        largest: upper bound of the largest absolute entry.
        maps: matrices, or diagonals of shape `(d,)`; empty when nothing more is known.
        source: radius of the ball that `maps` were applied to.

    Example:

    >>> from keras_lipattn.certification import TokenRange
    >>> tokens = TokenRange.of_entries(0.0, 1.0, width=4)
    >>> tokens.radius, tokens.center, tokens.largest
    (1.0, array([0.5, 0.5, 0.5, 0.5]), 1.0)
    """

    radius: float = math.inf
    center: np.ndarray | None = None
    largest: float = math.inf
    maps: tuple[np.ndarray, ...] = ()
    source: float = math.inf

    def __post_init__(self):
        if not self.largest <= self.reach:
            object.__setattr__(self, "largest", self.reach)

    @property
    def bounded(self) -> bool:
        """Whether the tokens are in a ball of finite radius."""
        return math.isfinite(self.radius)

    @property
    def reach(self) -> float:
        """Largest absolute entry that the ball allows."""
        offset = 0.0 if self.center is None else float(np.abs(self.center).max(initial=0.0))
        return self.radius + offset

    @property
    def outer_radius(self) -> float:
        """Radius of a ball around the origin that contains the tokens."""
        return self.radius + (0.0 if self.center is None else float(np.linalg.norm(self.center)))

    @classmethod
    def of_values(cls, values: np.ndarray) -> "TokenRange":
        """The range of known tokens, an array of shape `(..., d)`."""
        values = np.asarray(values, np.float64)
        if not np.isfinite(values).all() or values.size == 0:
            return cls()
        tokens = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
        center = tokens.mean(axis=0)
        radius = float(np.linalg.norm(tokens - center, axis=1).max())
        return cls(radius, center, float(np.abs(tokens).max()))

    @classmethod
    def of_entries(cls, low: float, high: float, width: int) -> "TokenRange":
        """All tokens of `width` entries in `[low, high]`."""
        middle = 0.5 * (low + high)
        center = np.full(width, middle) if middle else None
        return cls(math.sqrt(width) * 0.5 * (high - low), center, max(abs(low), abs(high)))

    @classmethod
    def up_to(cls, largest: float, width: int | None) -> "TokenRange | None":
        """All tokens of `width` entries of at most this size, `None` if either is not known."""
        if width is None or not math.isfinite(largest):
            return None
        return cls.of_entries(-SAFETY * largest, SAFETY * largest, width)

    def about_origin(self) -> "TokenRange":
        """A ball around the origin that contains the tokens, for maps that move the center."""
        return TokenRange(self.outer_radius, None, self.largest)

    def including(self, point: np.ndarray) -> "TokenRange":
        """The smallest ball that contains this one and a point."""
        center = np.zeros(point.shape) if self.center is None else self.center
        way = point - center
        distance = float(np.linalg.norm(way))
        if not self.bounded or distance <= self.radius:
            return self
        farther = 0.5 * (distance - self.radius)
        largest = max(self.largest, float(np.abs(point).max(initial=0.0)))
        return TokenRange(
            SAFETY * 0.5 * (distance + self.radius), center + way * (farther / distance), largest
        )

    def scaled(self, factor: float) -> "TokenRange":
        """The range of `factor * x`."""
        center = None if self.center is None else factor * self.center
        if factor == 0.0:
            return TokenRange(0.0, center if self.bounded else None, 0.0)
        return TokenRange(abs(factor) * self.radius, center, abs(factor) * self.largest)

    def plus(self, other: "TokenRange") -> "TokenRange":
        """The range of `x + y`."""
        if self.center is None or other.center is None:
            center = self.center if other.center is None else other.center
        elif self.center.shape == other.center.shape:
            center = self.center + other.center
        else:
            return self.about_origin().plus(other.about_origin())
        return TokenRange(self.radius + other.radius, center, self.largest + other.largest)

    def mapped(
        self, matrix: np.ndarray | None, bias: np.ndarray | None, constant: float
    ) -> "TokenRange":
        """The range of `x @ matrix + bias`.

        Args:
            matrix: shape `(d_in, d_out)`, a diagonal of shape `(d,)`, or `None` for the identity.
            bias: shape `(d_out,)`, `(tokens, d_out)`, or `None`.
            constant: upper bound of the spectral norm of the matrix.
        """
        if not self.bounded:
            return TokenRange()
        center = self.center
        if center is not None and matrix is not None:
            if matrix.shape[0] != center.shape[0]:
                center = np.broadcast_to(center, matrix.shape[:1])
            center = center * matrix if matrix.ndim == 1 else center @ matrix
        moved = TokenRange(self.radius * constant if constant else 0.0, center)
        shift = TokenRange(0.0) if bias is None else TokenRange.of_values(bias)
        shifted = moved if bias is None else moved.plus(shift)
        if shift.radius > 0.0:
            return shifted
        maps = self.maps if matrix is None else (*self.maps, matrix)
        source = self.source if self.maps else self.radius
        return dataclasses.replace(shifted, maps=maps, source=source)

    def smaller(self, other: "TokenRange") -> "TokenRange":
        """The smaller of two valid ranges of the same tensor."""
        best = other if other.radius < self.radius else self
        return dataclasses.replace(best, largest=min(self.largest, other.largest))

    def axes(self, width: int) -> np.ndarray:
        """A matrix `(r, width)`: every token is `center + v @ axes` with `|v| <= 1`."""
        if not self.maps:
            return self.radius * np.eye(width)
        product = self.maps[0]
        for matrix in self.maps[1:]:
            product = product * matrix if matrix.ndim == 1 else _rows(product) @ matrix
        return self.source * _rows(product)


def _rows(linear: np.ndarray) -> np.ndarray:
    return np.diag(linear) if linear.ndim == 1 else linear
