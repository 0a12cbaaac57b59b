"""Gains into other norms than that of the certificate (docs/theory.md, section 8).

A certificate in one norm also bounds the change of each tensor in the other norms, and a bound in
one norm bounds the others at a known price. Each tensor has a second state for each other norm that
may help. After every call the gains are relaxed: each is at most another one times its price.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from keras_lipattn.bounds.layer_constants import conversion_constant
from keras_lipattn.certification import linear_map
from keras_lipattn.certification.maps import (
    Affine,
    Combination,
    Composite,
    Elementwise,
    LipschitzMap,
)
from keras_lipattn.certification.tensor_state import TensorState, product

# By the norm of the certificate. The max norm is the smallest one, and the way back from it has the
# largest price.
OTHERS = {"l2": ("token",), "token": ("l2",), "linf": ("token", "l2")}
_BY_SIZE = ("linf", "token", "l2")


class OtherNorms:
    """The states of tensors in other norms.

    Args:
        norm: norm of the certificate.
    """

    def __init__(self, norm: str):
        self._norm = norm
        self._others = OTHERS[norm]

    def complete(self, state: TensorState) -> TensorState:
        """The state with states in the other norms where it has none: its gain at a price."""
        if state.is_fixed or state.others:
            return state
        return state.replace(others={norm: self.view(state, norm) for norm in self._others})

    def view(self, state: TensorState, norm: str) -> TensorState:
        """The state in another norm."""
        if state.is_fixed or norm == self._norm:
            return state
        if norm in state.others:
            return state.others[norm]
        factor = price(state, self._norm, norm)
        gain, published = state.gain.scaled(factor), state.published.scaled(factor)
        # The gains of the tensors that it is a linear map of are those of the other norm.
        return state.replace(gain=gain, published=published).without_maps()

    def after(
        self,
        rule_map: LipschitzMap,
        ask: Callable[[str], LipschitzMap],
        given: Sequence[TensorState],
        outputs: Sequence[TensorState],
        row: int,
    ) -> list[TensorState]:
        """The states of the outputs of a call, with the smallest gains in every norm.

        Args:
            rule_map: the map of the call in the norm of the certificate, with a finite constant.
            ask: a function that returns the map in another norm.
            given: states of all tensors among the arguments.
            outputs: states of the outputs in the norm of the certificate.
            row: index of the row of the call in the certificate.
        """
        families = [{self._norm: output} for output in outputs]
        for norm in self._others:
            if norm in rule_map.larger_in:
                continue
            other = self._map(rule_map, norm, ask)
            if math.isinf(other.constant):
                continue
            views = [self.view(state, norm) for state in given]
            for family, output in zip(families, outputs, strict=True):
                found = other.propagate(views, row, norm, output.layout)
                family[norm] = found.replace(range=output.range)
        return [self._relaxed(family, row) for family in families]

    def _map(self, rule_map: LipschitzMap, norm: str, ask) -> LipschitzMap:
        known = same_map(rule_map, self._norm, norm)
        if known is None:
            return ask(norm)
        if known.operands is not None:
            operands = tuple(self.view(state, norm) for state in known.operands)
            known = dataclasses.replace(known, operands=operands)
        if known.function_of is not None:
            name, state, size = known.function_of
            function_of = (name, self.view(state, norm), size)
            known = dataclasses.replace(known, function_of=function_of)
        return known

    def _relaxed(self, family: dict[str, TensorState], row: int) -> TensorState:
        own = family[self._norm]
        for norm in self._others:
            if norm not in family:
                family[norm] = self.view(own, norm)
        # From the largest norm down, where steps are free, and then up again.
        for norms in (_BY_SIZE[::-1], _BY_SIZE):
            for source in norms:
                for target in norms:
                    if source in family and target in family and source != target:
                        family[target] = _smaller(
                            family[target], target, family[source], source, row
                        )
        own = family.pop(self._norm)
        return own.replace(others=family)


def price(state: TensorState, source: str, target: str) -> float:
    """Largest ratio of the norm `target` of the tensor to its norm `source`, at least 1."""
    if _BY_SIZE.index(target) <= _BY_SIZE.index(source):
        return 1.0
    tokens = product((state.fold or 1, *state.shape[:-1])) if target == "l2" else 1
    width = (state.shape[-1] if state.shape else 1) if source == "linf" else 1
    if tokens is None or width is None:
        return math.inf
    return conversion_constant(source, target, tokens=tokens, width=width)


def same_map(rule_map: LipschitzMap, norm: str, other: str) -> LipschitzMap | None:
    """The map with its constant in another norm, `None` if only its rule knows it."""
    if type(rule_map) in (Elementwise, Combination):
        return rule_map
    if type(rule_map) is Affine:
        if {norm, other} == {"l2", "token"}:
            return rule_map
        constant = linear_map.matrix_norm(rule_map.matrix, other)
        return dataclasses.replace(rule_map, constant=constant, published=constant)
    if type(rule_map) is Composite and {norm, other} == {"l2", "token"}:
        stages = [same_map(stage, norm, other) for stage in rule_map.stages]
        return None if None in stages else rule_map
    return None


def _smaller(
    state: TensorState, norm: str, other: TensorState, source: str, row: int
) -> TensorState:
    """The state with the gain of another one in place of its own, if that is smaller."""
    factor = price(state, source, norm)
    if math.isinf(factor):
        return state
    gain, published = other.gain.scaled(factor), other.published.scaled(factor)
    changes = {}
    if gain.log < state.gain.log:
        costs = dict(other.costs)
        costs[row] = costs.get(row, 0.0) + gain.log - math.fsum(costs.values())
        changes = {"gain": gain, "costs": costs}
    if published.log < state.published.log:
        changes["published"] = published
    return state.replace(others=state.others, **changes) if changes else state
