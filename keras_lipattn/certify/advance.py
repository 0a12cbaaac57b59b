"""From the states of the inputs of a call to the state of its output."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_lipattn.certify import linear_map
from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.gain import Gain
from keras_lipattn.certify.step import Step
from keras_lipattn.certify.tensor_state import TensorState


def advance(
    step: Step,
    given: Sequence[TensorState],
    row: int,
    *,
    masked: bool,
    norm: str,
    shape: tuple[int | None, ...],
    dynamic: tuple[bool, ...],
    dtype: str,
) -> TensorState:
    """State of the output of a call.

    Args:
        step: what the rule says about the call.
        given: states of all tensors among the arguments.
        row: index of the row of the certificate that the call gets.
        masked: whether a mask travels with the output.
        norm: norm of the certificate.
        shape: sizes of the axes of the output.
        dynamic: which of them vary.
        dtype: of the output.

    Returns:
        A `TensorState`.
    """
    operands = list(step.operands if step.operands is not None else given)
    moving = [state for state in operands if not state.held]
    layout: dict[str, Any] = dict(shape=shape, dynamic=dynamic, dtype=dtype, masked=masked)
    if not moving:
        nothing = Gain.none(norm)
        return TensorState(
            gain=nothing, published=nothing, held=True, domain=step.domain or Domain(), **layout
        )
    if math.isinf(step.constant):
        unbounded = Gain.unbounded(norm, [state.gain for state in moving])
        return TensorState(gain=unbounded, published=unbounded, **layout)
    if step.coefficients is not None:
        output = _combine(step, operands, norm, layout)
    elif len(moving) == 1 and step.gains is None:
        output = _pass_through(step, moving[0], norm, layout)
    else:
        output = _merge(step, operands, norm, layout)
    return output.replace(costs=_costs(output.gain, moving, step, row))


def side_by_side(norm: str, states: Sequence[TensorState], *, entrywise: bool = False):
    """Gains of several tensors seen as one: ours and with the published bounds."""
    return (
        Gain.stacked(norm, [state.gain for state in states], entrywise=entrywise),
        Gain.stacked(norm, [state.published for state in states], entrywise=entrywise),
    )


def _pass_through(step: Step, state: TensorState, norm: str, layout: dict) -> TensorState:
    """A call with one moving input."""
    gain, published = state.gain.scaled(step.constant), state.published.scaled(step.published)
    domain, anchor, linear = step.domain or Domain(), None, None
    routes: tuple = ()
    if step.entry_offset is not None and state.domain.bounded and state.width is not None:
        # Euclidean radius and slope: a function of one entry has one constant in every norm.
        domain = domain.smaller(
            Domain(
                step.constant * state.domain.outer_radius
                + math.sqrt(state.width) * step.entry_offset,
                None,
                step.constant * state.domain.largest + step.entry_offset,
            )
        )
    if step.stages:
        inner = state
        for stage in step.stages:
            inner = _pass_through(stage, inner, norm, layout)
        gain, published = gain.smaller(inner.gain), published.smaller(inner.published)
        domain, anchor, linear = domain.smaller(inner.domain), inner.anchor, inner.linear
        routes = inner.routes
    elif step.is_linear_map:
        anchor, linear = state.root, linear_map.compose(state.linear, step.matrix)
        routes = ((state, step.matrix), (anchor, linear))
        if state.domain.bounded:
            # The radius is Euclidean whatever the norm of the certificate.
            size = step.constant if norm != "linf" else linear_map.matrix_norm(step.matrix, "l2")
            domain = domain.smaller(_affine(state.domain, step.matrix, step.bias, size))
        if state.linear is not None and step.matrix is not None:
            merged = linear_map.matrix_norm(linear, norm)
            gain = gain.smaller(anchor.gain.scaled(merged))
            published = published.smaller(anchor.published.scaled(merged))
    elif step.mixes_tokens and state.anchor is not None:
        root = state.anchor
        width = None if state.linear is None else state.linear.shape[0]
        anchor = TensorState(
            gain=root.gain.scaled(step.constant),
            published=root.published.scaled(step.published),
            shape=(*layout["shape"][:-1], width or layout["shape"][-1]),
            dynamic=layout["dynamic"],
        )
        linear = state.linear
    return TensorState(
        gain=gain,
        published=published,
        domain=domain,
        anchor=anchor,
        linear=linear,
        routes=routes,
        **layout,
    )


def _combine(step: Step, operands: list[TensorState], norm: str, layout: dict) -> TensorState:
    """A sum with fixed coefficients: branches of one root are added before the norm is taken."""
    terms = list(zip(step.coefficients or (), operands, strict=True))
    width = layout["shape"][-1] if layout["shape"] else None
    domain = step.domain or Domain()
    total = None
    for coefficient, state in terms:
        known = state.values is not None or state.width == width
        term = _affine(
            state.domain if known else Domain(),
            _as_linear(coefficient, width),
            None,
            _largest(coefficient),
        )
        total = term if total is None else total.plus(term)
    groups: dict[int, list[tuple]] = {}
    for coefficient, state in terms:
        if not state.held:
            groups.setdefault(id(state.root), []).append((coefficient, state))
    gains, published = [], []
    merged_root, merged_map = None, None
    for members in groups.values():
        ours = Gain.summed(norm, [s.gain.scaled(_largest(c)) for c, s in members])
        theirs = Gain.summed(norm, [s.published.scaled(_largest(c)) for c, s in members])
        if width is not None:
            root, linear = members[0][1].root, None
            maps = [linear_map.compose(s.linear, _as_linear(c, width)) for c, s in members]
            linear = maps[0]
            for other in maps[1:]:
                linear = linear_map.add(linear, other, width)
            if len(members) > 1:
                constant = linear_map.matrix_norm(linear, norm)
                ours = ours.smaller(root.gain.scaled(constant))
                theirs = theirs.smaller(root.published.scaled(constant))
            if len(groups) == 1:
                merged_root, merged_map = root, linear
        gains.append(ours)
        published.append(theirs)
    return TensorState(
        gain=Gain.summed(norm, gains),
        published=Gain.summed(norm, published),
        domain=domain.smaller(total or Domain()),
        anchor=merged_root,
        linear=merged_map,
        **layout,
    )


def _merge(step: Step, operands: list[TensorState], norm: str, layout: dict) -> TensorState:
    """A call with several moving inputs which is no fixed linear combination."""
    moving = [state for state in operands if not state.held]
    gain, published = side_by_side(norm, moving, entrywise=step.entrywise)
    gain, published = gain.scaled(step.constant), published.scaled(step.published)
    if step.gains is not None:
        parts = list(zip(step.gains, operands, strict=True))
        gain = gain.smaller(Gain.summed(norm, [s.gain.scaled(g) for g, s in parts if not s.held]))
        published = published.smaller(
            Gain.summed(norm, [s.published.scaled(g) for g, s in parts if not s.held])
        )
    anchor, linear = None, None
    if step.concatenates:
        anchor = operands[0].root
        maps = [linear_map.as_matrix(state.linear, state.shape[-1] or 0) for state in operands]
        linear = np.concatenate(maps, axis=1)
        constant = linear_map.matrix_norm(linear, norm)
        gain = gain.smaller(anchor.gain.scaled(constant))
        published = published.smaller(anchor.published.scaled(constant))
    return TensorState(
        gain=gain,
        published=published,
        domain=step.domain or Domain(),
        anchor=anchor,
        linear=linear,
        **layout,
    )


def _affine(domain: Domain, matrix, bias, constant: float) -> Domain:
    """The domain of `x @ matrix + bias`, where `constant` bounds the norm of the matrix."""
    if not domain.bounded:
        return Domain()
    centre = domain.centre
    if centre is not None and matrix is not None:
        if matrix.shape[0] != centre.shape[0]:
            centre = np.broadcast_to(centre, matrix.shape[:1])
        centre = centre * matrix if matrix.ndim == 1 else centre @ matrix
    moved = Domain(domain.radius * constant if constant else 0.0, centre)
    shift = Domain(0.0) if bias is None else Domain.of_values(bias)
    shifted = moved if bias is None else moved.plus(shift)
    if shift.radius > 0.0:
        return shifted
    maps = domain.maps if matrix is None else (*domain.maps, matrix)
    source = domain.source if domain.maps else domain.radius
    return dataclasses.replace(shifted, maps=maps, source=source)


def _as_linear(coefficient, width: int | None):
    if np.ndim(coefficient) == 0:
        if coefficient == 1.0 or width is None:
            return None
        return np.full(width, float(coefficient))
    return np.asarray(coefficient, np.float64)


def _largest(coefficient) -> float:
    return float(np.max(np.abs(coefficient)))


def _costs(gain: Gain, moving: list[TensorState], step: Step, row: int) -> dict[int, float]:
    """Parts of the logarithm of a gain, by row; they sum to it.

    What several inputs bring is weighted by their shares in the sum; the rest is what the call
    itself costs, the price of branching included.
    """
    if not math.isfinite(gain.log):
        return {}
    logs = [state.gain.log for state in moving]
    top = max(logs)
    if not math.isfinite(top):
        return {row: gain.log}
    weights = [math.exp(log - top) for log in logs]
    costs: dict[int, float] = {}
    brought = 0.0
    for state, weight in zip(moving, weights, strict=True):
        share = weight / sum(weights)
        brought += share * state.gain.log if weight > 0.0 else 0.0
        for index, cost in state.costs.items():
            costs[index] = costs.get(index, 0.0) + share * cost
    costs[row] = costs.get(row, 0.0) + gain.log - brought
    return costs
