"""The rows of a certificate while it is made, and which of them explain others."""

import dataclasses
import math
from collections.abc import Container, Iterator, Sequence

from keras_lipattn.certification.maps import LipschitzMap
from keras_lipattn.certification.reasons import (
    COMPUTES_INTEGERS,
    COMPUTES_MASK,
    CONDITION_JUMPS,
    REPEATS,
    TAKES_MASK,
    Cause,
    Reason,
)
from keras_lipattn.certification.registry import find_rule
from keras_lipattn.certification.tensor_state import TensorState
from keras_lipattn.certification.trace import Trace, TracedCall


@dataclasses.dataclass
class Row:
    """A row of the certificate, see `CertificateRow`; `reason` has its remedy."""

    path: str
    layer_class: str
    map: LipschitzMap
    reason: Reason
    radius: float = math.inf
    tokens: int | None = None
    explained_by: str = ""


class Rows:
    """The rows of a certificate, in the order of the calls.

    Args:
        trace: the trace of the model.
        batch_dependent: indices of the calls that differ between batches of different size.
        sequence_length: as passed to `certify`.
    """

    def __init__(self, trace: Trace, batch_dependent: Container[int], sequence_length: int | None):
        self._trace = trace
        self._batch_dependent = batch_dependent
        self._sequence_length = sequence_length
        self._rows: list[Row] = []
        self._paths: set[str] = set()
        # From the `id` of a tensor to the rows without a bound that it depends on.
        self._causes: dict[int, frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def unique(self, path: str) -> str:
        """A path that no other row has: a second call of a layer gets ":call2"."""
        candidate, calls = path, 1
        while candidate in self._paths:
            calls += 1
            candidate = f"{path}:call{calls}"
        self._paths.add(candidate)
        return candidate

    def add_refusal(self, path: str, layer_class: str, reason: Reason) -> None:
        """Adds a row without a bound that belongs to no call."""
        refusal = LipschitzMap(constant=math.inf, reason=reason)
        self._rows.append(Row(self.unique(path), layer_class, refusal, reason))

    def add(
        self,
        index: int,
        call: TracedCall,
        path: str,
        rule_map: LipschitzMap,
        perturbed: Sequence[TensorState],
    ) -> None:
        """Adds the row of a call.

        Args:
            index: of the call in the trace.
            call: the call.
            path: from `unique`.
            rule_map: the map of the call.
            perturbed: its inputs that change with the certified inputs.
        """
        reason = Reason.of(rule_map.reason)
        if math.isinf(rule_map.constant):
            reason = reason.with_remedy(
                call.operation,
                has_rule=find_rule(call.operation)[0] is not None,
                sequence_length=self._sequence_length,
            )
        row = Row(
            path=path,
            layer_class=type(call.operation).__name__,
            # Without the matrices.
            map=LipschitzMap(
                constant=rule_map.constant,
                published=rule_map.published,
                theorem=rule_map.theorem,
                reason=rule_map.reason,
                exact=rule_map.exact,
            ),
            reason=reason,
            radius=max((state.range.radius for state in perturbed), default=0.0),
            tokens=perturbed[0].tokens if perturbed else None,
        )
        causes = frozenset().union(
            *(
                self._causes.get(id(self._trace.resolve(tensor)), frozenset())
                for tensor in (*call.tensors, *call.keras_masks)
            )
        )
        if math.isinf(rule_map.constant):
            self._explain(row, [self._rows[number] for number in sorted(causes)], index)
            causes |= {len(self._rows)}
        if causes:
            self._causes.update(dict.fromkeys(map(id, call.outputs), causes))
        self._rows.append(row)

    def _explain(self, row: Row, causes: Sequence[Row], index: int) -> None:
        """Notes which row explains another, of a row without a bound and earlier ones."""
        for cause in causes:
            if cause.map.reason == COMPUTES_INTEGERS and row.map.reason == TAKES_MASK:
                # The row of the call that takes the mask is more specific.
                cause.explained_by = row.path
            elif self._follows(row, index, cause):
                row.explained_by = row.explained_by or cause.path

    def _follows(self, row: Row, index: int, cause: Row) -> bool:
        """Whether a row has no bound only because an earlier one has none."""
        if cause.map.reason == COMPUTES_MASK:
            return row.map.reason == TAKES_MASK
        if cause.map.reason == COMPUTES_INTEGERS:
            jumps = row.map.reason in (COMPUTES_INTEGERS, CONDITION_JUMPS)
            return jumps or row.reason.cause is Cause.UNBOUNDED
        return cause.reason.cause is Cause.BATCH and (
            index in self._batch_dependent or row.map.reason == REPEATS
        )
