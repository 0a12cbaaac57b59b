"""One step of a proof, with the arrays that the served graph has for it."""

import math
from typing import Any

import numpy as np

from keras_lipattn.checker.refusal import NotVerified, require
from keras_lipattn.checker.served_function import Region
from keras_lipattn.checker.tensor_bounds import Bounds

Values = list[np.ndarray]


class Step:
    """One step of a proof, with the arrays that the served graph has for it.

    Args:
        entry: The step in the proof.
        region: The operations of the served graph between its tensors.
    """

    def __init__(self, entry: dict[str, Any], region: Region):
        self.kind: str = entry["kind"]
        self.layer: str = entry["layer"]
        self.parameters: dict[str, Any] = entry["parameters"]
        self._arrays = {
            name: _served(name, stated, region, self.layer)
            for name, stated in entry["arrays"].items()
        }

    def array(self, name: str) -> np.ndarray:
        """An array of the step, in float64."""
        require(name in self._arrays, f"{self.layer}: the proof names no array {name!r}")
        return self._arrays[name]

    def optional(self, name: str) -> np.ndarray | None:
        """An array of the step, or `None`."""
        return self._arrays.get(name)

    def number(self, name: str) -> float:
        """A finite parameter."""
        value = self.parameters.get(name)
        fits = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
        require(fits, f"{self.layer}: parameter {name} is {value!r}")
        return float(value)  # type: ignore[arg-type]

    def positive(self, name: str) -> float:
        """A positive parameter."""
        value = self.number(name)
        require(value > 0.0, f"{self.layer}: parameter {name} is {value!r}")
        return value

    def integer(self, name: str) -> int:
        """A positive integer parameter."""
        value = self.parameters.get(name)
        require(type(value) is int and value >= 1, f"{self.layer}: parameter {name} is {value!r}")
        assert isinstance(value, int)
        return value

    def integers(self, name: str) -> list[int]:
        """A parameter that is a list of positive integers."""
        value = self.parameters.get(name)
        fits = isinstance(value, list) and all(type(one) is int and one >= 1 for one in value)
        require(fits, f"{self.layer}: parameter {name} is {value!r}")
        assert isinstance(value, list)
        return value

    def sizes(self, name: str, count: int) -> np.ndarray:
        """Numbers of at least 0, one for each head; they only make a constant larger."""
        value = np.asarray(self.parameters.get(name, [0.0] * count), np.float64)
        require(
            value.shape == (count,) and bool((value >= 0.0).all() and np.isfinite(value).all()),
            f"{self.layer}: parameter {name} is no list of {count} sizes",
        )
        return value

    def axes(self, rank: int) -> list[int]:
        """Axes of attention in a tensor of this rank."""
        axes = self.integers("axes")
        fits = len(set(axes)) == len(axes) > 0 and all(axis < rank - 1 for axis in axes)
        require(fits and axes == sorted(axes), f"{self.layer}: its axes are {axes}")
        return axes

    def tokens(self, state: Bounds) -> int:
        """Largest number of tokens that attend to each other."""
        axes = self.axes(len(state.shape) + 1)
        return math.prod(state.shape[axis - 1] for axis in axes)


def _served(name: str, stated: Any, region: Region, layer: str) -> np.ndarray:
    require(
        isinstance(stated, dict) and isinstance(stated.get("shape"), list),
        f"{layer}: array {name!r} has no shape",
    )
    found = region.constants.get(str(stated.get("sha256")))
    if found is None:
        raise NotVerified(f"{layer}: the served graph has no array with the SHA-256 of {name!r}")
    shape = stated["shape"]
    fits = all(type(size) is int and size >= 0 for size in shape)
    require(fits and math.prod(shape) == found.size, f"{layer}: array {name!r} has another shape")
    require(bool(np.isfinite(found).all()), f"{layer}: array {name!r} is not finite")
    return found.reshape(shape)
