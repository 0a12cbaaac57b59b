"""Local certificates: the ball around one input, followed through the graph.

At each tensor its value at the centre is kept, and the radius of a ball that holds its image:
what the certificate says so far, times the radius of the input ball, plus what the value is
uncertain by. Rules find both in `state.near` and may give a constant that only holds there.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lipattn.certify.gain import Gain
from keras_lipattn.certify.near import Near
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState
from keras_lipattn.certify.values import UnknownValue, evaluate
from keras_lipattn.linalg import SAFETY

# Of a float64 evaluation, relative to the sizes of what goes in and comes out.
ROUNDING = 1e-11


class Locality:
    """The ball of one local certificate. Follows tensors in the 2-norm, whatever the norm.

    A certificate in another norm takes two walks: the first one in the 2-norm, the second one
    meets the same calls in the same order and is told what the first one found.

    Args:
        centre: the inputs of the model, one example each, in order.
        radius: radius of the ball in the norm of the certificate.
        norm: that norm.
    """

    def __init__(self, centre: Sequence[np.ndarray], radius: float, norm: str):
        self.lost: dict[str, str] = {}
        self._radius = radius
        self._norm = norm
        self._centre = list(centre)
        # Of the certified inputs, by their numbers, in the 2-norm.
        self._radii: dict[int, float] = {}
        self._found: list[list[Near | None]] = []
        self._replayed_calls: int = -1

    def _start(self, state: TensorState) -> float:
        """Radius of a 2-norm ball that contains the ball of the norm around a certified input."""
        radius = self._radius
        if self._norm != "l2":
            # The number of tokens of Euclidean norm `radius`, or of entries of this size.
            count = state.tokens if self._norm == "token" else state.entries
            radius *= SAFETY * math.sqrt(count or 1)
        self._radii.update(dict.fromkeys(state.gain.logs, radius))
        return radius

    def _reach(self, gain: Gain) -> float:
        """How far a tensor of this gain in the 2-norm can be from its value."""
        if self._norm == "l2":
            # All inputs side by side share one ball.
            return math.exp(gain.log) * self._radius
        return math.hypot(*(math.exp(log) * self._radii[key] for key, log in gain.logs.items()))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the inputs without the batch axis."""
        return [value.shape[1:] for value in self._centre]

    def begin(self, states: Sequence[TensorState]) -> list[TensorState]:
        """The states of the inputs, with what is known about them. Begins the next walk."""
        if self._found:
            self._replayed_calls = 0
            return self._replayed(states)
        nears: list[Near | None] = []
        for state, value in zip(states, self._centre, strict=True):
            nears.append(Near(value, 0.0 if state.held else self._start(state)))
        return self._noted(states, nears)

    def after(
        self,
        operation: Any,
        args: Any,
        kwargs: Any,
        step: Step | None,
        outputs: Sequence[TensorState],
        path: str,
        dtype: str | None,
    ) -> list[TensorState]:
        """The states of the outputs of a call, with what is known about them."""
        if self._replayed_calls >= 0:
            return self._replayed(outputs)
        nears: list[Near | None] = [None] * len(outputs)
        try:
            if step is not None and step.lost:
                raise UnknownValue(step.lost)
            values = evaluate(operation, args, kwargs, step, dtype)
        except UnknownValue as unknown:
            self.lose(path, str(unknown), _states(args, kwargs))
        else:
            nears = [
                self._near(value, mask, step, output, _states(args, kwargs))
                for output, (value, mask) in zip(outputs, values, strict=True)
            ]
        return self._noted(outputs, nears)

    def lose(self, path: str, reason: str, given: Sequence[TensorState]) -> None:
        """Notes the call after which values are not known, unless they were lost before it."""
        if not any(state.near is None for state in given):
            self.lost[path] = reason

    def _near(self, value, mask, step, output, given) -> Near | None:
        if output.held or step is None:
            return Near(value, 0.0, 0.0, mask)
        if step.starts:
            return Near(value, self._start(output), 0.0, mask)
        if output.gain.log > 700.0:
            return None
        operands = given if step.operands is None else step.operands
        moving = [(index, state.near) for index, state in enumerate(operands) if not state.held]
        drifts = [known.drift for _, known in moving]
        weights = step.gains if step.coefficients is None else step.coefficients
        if weights is None:
            drift = step.constant * math.hypot(*drifts)
        else:
            drift = math.fsum(
                float(np.max(np.abs(weights[index]))) * known.drift for index, known in moving
            )
        sizes = Near(value).size + step.constant * math.hypot(*(near.size for _, near in moving))
        drift += step.drift + ROUNDING * sizes
        return Near(value, SAFETY * self._reach(output.gain) + drift, drift, mask)

    def _noted(self, states, nears) -> list[TensorState]:
        self._found.append(list(nears))
        return [_with(state, near) for state, near in zip(states, nears, strict=True)]

    def _replayed(self, states) -> list[TensorState]:
        nears = self._found[self._replayed_calls]
        self._replayed_calls += 1
        return [_with(state, near) for state, near in zip(states, nears, strict=True)]


def _with(state: TensorState, near: Near | None) -> TensorState:
    if near is None:
        return state.replace(near=None)
    if state.held or not np.issubdtype(near.value.dtype, np.floating):
        return state.replace(near=near)
    return state.replace(near=near, domain=state.domain.smaller(near.domain))


def _states(args: Any, kwargs: Any) -> list[TensorState]:
    leaves = keras.tree.flatten((args, kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, TensorState)]
