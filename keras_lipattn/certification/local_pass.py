"""Local certificates: enclosures of all tensors for inputs in a ball.

The model is evaluated once in float64. Every tensor gets an enclosure: its value at the center, and
the radius of a ball that contains it for every input. This radius is the Lipschitz constant of the
tensor times the radius of the input ball, plus the rounding error of the value. Rules read it from
`state.enclosure` and may return a constant that holds only there.
"""

import math
from collections.abc import Sequence

import numpy as np
from keras import KerasTensor

from keras_lipattn.certification.classifier_head import without_activation
from keras_lipattn.certification.evaluation import UnknownValue, evaluate
from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.maps import LipschitzMap
from keras_lipattn.certification.tensor_state import Enclosure, TensorState
from keras_lipattn.certification.trace import Trace
from keras_lipattn.linalg import SAFETY

# Rounding error of a float64 evaluation, relative to the norms of inputs and outputs.
ROUNDING = 1e-11
# With a larger logarithm of the gain there is no enclosure.
_LARGEST_LOG = 700.0


class LocalPass:
    """The ball of a local certificate and the enclosures of all tensors.

    Enclosures are computed from gains in the 2-norm. A certificate in another norm needs two
    propagations: the first one, in the 2-norm, computes the enclosures; the second one reads them.

    Args:
        trace: the model, traced for one example.
        center: the inputs of the model, one example each, in order.
        radius: radius of the ball in the norm of the certificate.
        norm: that norm.
        logit_call: index of the call whose activation is left out, or `None`.
    """

    def __init__(
        self,
        trace: Trace,
        center: Sequence[np.ndarray],
        radius: float,
        norm: str,
        logit_call: int | None = None,
    ):
        self.lost: dict[str, str] = {}
        self.is_complete = False
        self._trace = trace
        self._radius = radius
        self._norm = norm
        self._logit_call = logit_call
        self._center = list(center)
        self._values: dict[int, np.ndarray] = {}
        # Radii in the 2-norm, by the number of a certified input.
        self._radii: dict[int, float] = {}
        # By the index of a call.
        self._enclosures: dict[int, list[Enclosure | None]] = {}

    def begin(self, states: Sequence[TensorState]) -> list[TensorState]:
        """The states of the inputs, with their enclosures."""
        if not self.is_complete:
            for tensor, value in zip(self._trace.inputs, self._center, strict=True):
                self._values[id(tensor)] = value
            self._enclosures[-1] = [
                Enclosure(value, 0.0 if state.is_fixed else self._start(state))
                for state, value in zip(states, self._center, strict=True)
            ]
        return self._enclosed(-1, states)

    def after(
        self,
        index: int,
        rule_map: LipschitzMap | None,
        given: Sequence[TensorState],
        outputs: Sequence[TensorState],
    ) -> list[TensorState]:
        """The states of the outputs of a call, with their enclosures.

        Args:
            index: of the call.
            rule_map: the map of the call, `None` where no rule was needed.
            given: the states of the tensors among its arguments.
            outputs: the states of its outputs.
        """
        if not self.is_complete:
            self._enclosures[index] = self._enclose(index, rule_map, given, outputs)
        return self._enclosed(index, outputs)

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
        """Largest 2-norm distance of a tensor of this gain from its value at the center."""
        if self._norm == "l2":
            # All inputs together are in one ball.
            return math.exp(gain.log) * self._radius
        return math.hypot(*(math.exp(log) * self._radii[key] for key, log in gain.logs.items()))

    def _enclose(self, index, rule_map, given, outputs) -> list[Enclosure | None]:
        call = self._trace.calls[index]
        try:
            leaves_out = index == self._logit_call
            with without_activation(call.operation if leaves_out else None):
                values = self._evaluate(call, rule_map)
        except UnknownValue as unknown:
            if all(state.enclosure is not None for state in given):
                self.lost[call.path] = str(unknown)
            return [None] * len(outputs)
        for tensor, value in zip(call.outputs, values, strict=True):
            self._values[id(tensor)] = value
        return [
            self._enclosure(call.path, value, rule_map, output, given)
            for output, value in zip(outputs, values, strict=True)
        ]

    def _evaluate(self, call, rule_map) -> list[np.ndarray]:
        if rule_map is None:
            return evaluate(call, self._value_of)
        center = rule_map.center
        if center is not None:
            if center.value is None:
                raise UnknownValue(center.reason)
            return [center.value]
        operands = rule_map.operands
        if operands is None:
            values = [self._value_of(tensor) for tensor in call.tensors]
        else:
            values = [
                one.values if one.enclosure is None else one.enclosure.value for one in operands
            ]
        result = rule_map.apply(values) if len(call.outputs) == 1 else None
        return evaluate(call, self._value_of) if result is None else [result]

    def _value_of(self, tensor: KerasTensor) -> np.ndarray | None:
        tensor = self._trace.resolve(tensor)
        if id(tensor) in self._trace.constants:
            return np.asarray(self._trace.constants[id(tensor)])
        return self._values.get(id(tensor))

    def _enclosure(self, path, value, rule_map, output, given) -> Enclosure | None:
        if output.is_fixed or rule_map is None:
            return Enclosure(value)
        if rule_map.resets_input:
            return Enclosure(value, self._start(output))
        if output.gain.log > _LARGEST_LOG:
            if all(state.gain.log <= _LARGEST_LOG for state in given):
                self.lost[path] = "the change of its output is not bounded"
            return None
        operands = list(given if rule_map.operands is None else rule_map.operands)
        perturbed = [(i, state.enclosure) for i, state in enumerate(operands) if not state.is_fixed]
        if any(known is None for _, known in perturbed):
            return None
        weights = rule_map.error_weights(len(operands))
        if weights is None:
            error = rule_map.constant * math.hypot(
                *(known.rounding_error for _, known in perturbed)
            )
        else:
            error = math.fsum(weights[i] * known.rounding_error for i, known in perturbed)
        sizes = Enclosure(value).size
        sizes += rule_map.constant * math.hypot(*(known.size for _, known in perturbed))
        error += ROUNDING * sizes
        if rule_map.center is not None:
            error += rule_map.center.rounding_error
        return Enclosure(value, SAFETY * self._reach(output.gain) + error, error)

    def _enclosed(self, index: int, states: Sequence[TensorState]) -> list[TensorState]:
        pairs = zip(states, self._enclosures[index], strict=True)
        return [_with_enclosure(state, enclosure) for state, enclosure in pairs]


def _with_enclosure(state: TensorState, enclosure: Enclosure | None) -> TensorState:
    if enclosure is None or state.is_fixed or not np.issubdtype(enclosure.value.dtype, np.floating):
        return state.replace(enclosure=enclosure)
    return state.replace(enclosure=enclosure, range=state.range.smaller(enclosure.range))
