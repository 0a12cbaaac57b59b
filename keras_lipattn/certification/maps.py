"""The maps by which rules describe layers: bounds of the change of their outputs.

For local certificates some maps also compute their output (`apply`, on numbers).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_lipattn.bounds.activated_product import activated_product_constant
from keras_lipattn.certification import linear_map
from keras_lipattn.certification.gain import Gain
from keras_lipattn.certification.linear_map import LinearMap, largest_size, of_coefficient
from keras_lipattn.certification.reasons import Reason
from keras_lipattn.certification.tensor_state import Activated, Kind, TensorState, costs_after
from keras_lipattn.certification.token_range import TokenRange


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CenterValue:
    """The output of a layer at the center of a local certificate, computed by its rule.

    Args:
        value: the output for one example, `None` if it is not known.
        rounding_error: upper bound of the 2-norm distance from `value` to the output of the model.
        reason: why it is not known.

    Example:

    >>> from keras_lipattn.certification import CenterValue
    >>> center = CenterValue(value=np.zeros(3), rounding_error=1e-12)
    >>> center.value.shape
    (3,)
    """

    value: np.ndarray | None = None
    rounding_error: float = 0.0
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LipschitzMap:
    """A proven Lipschitz constant of a call, with what else is known about the call.

    Only `constant` is required, and `reason` if the constant is `inf`. Subclasses describe special
    maps, such as affine ones, so that consecutive maps get one constant that is smaller than the
    product of theirs.

    Args:
        constant: Lipschitz constant in the norm of the certificate, with respect to all
            perturbed inputs side by side. NaN counts as `inf`.
        theorem: where the constant comes from, in a few words.
        reason: why no finite constant is known: a clause, or a `Reason` that also says what to do.
        published: the constant by the earlier published bound; NaN if it is the same.
        exact: whether the constant is attained or approached.
        range: a `TokenRange` that contains every token of the output, for every input in range.
        operands: the tensors that the map acts on; by default all tensors of the call in order.
        per_input: numbers with `|change| <= sum_i per_input[i] |change of operand i|`.
        entrywise: whether entries of different inputs share a token, as after a concatenation
            along the last axis.
        max_tokens: largest number of tokens for which the constant holds.
        resets_input: whether the output takes the place of the certified input, as after an
            embedding.
        assumes_fixed_mask: whether the constant holds only if a mask does not change.
        center: the output at the center of a local certificate.
        function_of: see `TensorState`.
        larger_in: norms in which the constant of the call is known to be no smaller.

    Raises:
        ValueError: if `constant` is `inf` and there is no `reason`.

    Example:

    >>> from keras_lipattn.certification import LipschitzMap, TokenRange
    >>> saturating = LipschitzMap(constant=0.5, theorem="largest slope", range=TokenRange(1.0))
    >>> saturating.constant, saturating.range.bounded
    (0.5, True)
    """

    constant: float
    theorem: str = ""
    reason: Reason | str = ""
    published: float = math.nan
    exact: bool = False
    range: TokenRange | None = None
    operands: tuple[TensorState, ...] | None = None
    per_input: tuple[float, ...] | None = None
    entrywise: bool = False
    max_tokens: int | None = None
    resets_input: bool = False
    assumes_fixed_mask: bool = False
    center: CenterValue | None = None
    function_of: tuple[str, TensorState, float] | None = None
    larger_in: tuple[str, ...] = ()

    def __post_init__(self):
        constant = float(self.constant)
        if math.isnan(constant) or constant < 0.0:
            # NaN weights give NaN constants.
            constant = math.inf
        object.__setattr__(self, "constant", constant)
        object.__setattr__(self, "reason", Reason.of(self.reason))
        if math.isnan(self.published):
            object.__setattr__(self, "published", constant)
        if math.isinf(constant) and not self.reason:
            raise ValueError(
                "A map without a finite constant must have a `reason`. "
                f"Received: constant={self.constant}, reason={str(self.reason)!r}"
            )

    def of_several_outputs(self) -> "LipschitzMap":
        """The same bounds for a call with several outputs, each of which has them.

        Only a mixing of tokens says nothing that would hold for one output alone.
        """
        if type(self) in (LipschitzMap, TokenMixing):
            return self
        names = (field.name for field in dataclasses.fields(LipschitzMap))
        return LipschitzMap(**{name: getattr(self, name) for name in names})

    # Bounds -----------------------------------------------------------------------------------

    def propagate(
        self, given: Sequence[TensorState], row: int, norm: str, layout: dict[str, Any]
    ) -> TensorState:
        """The state of the output.

        Args:
            given: states of all tensors among the arguments.
            row: index of the row of the call in the certificate.
            norm: norm of the certificate.
            layout: `shape`, `dynamic`, `fold` and `dtype` of the output.

        Returns:
            A `TensorState`.
        """
        operands = list(given if self.operands is None else self.operands)
        perturbed = [state for state in operands if not state.is_fixed]
        if not perturbed:
            nothing = Gain.none(norm)
            return TensorState(
                gain=nothing,
                published=nothing,
                kind=Kind.FIXED,
                range=self.range or TokenRange(),
                **layout,
            )
        if math.isinf(self.constant):
            unbounded = Gain.unbounded(norm, [state.gain for state in perturbed])
            return TensorState(gain=unbounded, published=unbounded, **layout)
        output = self._output_state(operands, norm, layout)
        costs = costs_after(output.gain, perturbed, row)
        return output.replace(costs=costs, function_of=self.function_of)

    def _output_state(self, operands: list[TensorState], norm: str, layout: dict) -> TensorState:
        """The state of the output, without its costs, for a finite constant."""
        perturbed = [state for state in operands if not state.is_fixed]
        gain, published = side_by_side(norm, perturbed, entrywise=self.entrywise)
        gain, published = gain.scaled(self.constant), published.scaled(self.published)
        if self.per_input is not None:
            parts = [
                (number, state)
                for number, state in zip(self.per_input, operands, strict=True)
                if not state.is_fixed
            ]
            gain = gain.smaller(Gain.summed(norm, [s.gain.scaled(g) for g, s in parts]))
            published = published.smaller(
                Gain.summed(norm, [s.published.scaled(g) for g, s in parts])
            )
        return TensorState(
            gain=gain, published=published, range=self.range or TokenRange(), **layout
        )

    # Values -----------------------------------------------------------------------------------

    def apply(self, values: Sequence[np.ndarray | None]) -> np.ndarray | None:
        """The output in float64 for values of the operands, `None` if the layer has to run."""
        return None

    def error_weights(self, count: int) -> Sequence[float] | None:
        """Factors from errors of the operands to the output, `None` for `constant` on all."""
        return self.per_input


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Affine(LipschitzMap):
    """`x @ matrix + bias` on the last axis.

    Args:
        matrix: shape `(d_in, d_out)`, a diagonal of shape `(d,)`, or `None` for the identity.
        bias: shape `(d_out,)`, `(tokens, d_out)`, or `None`.

    Example:

    >>> from keras_lipattn.certification import Affine
    >>> doubled = Affine(constant=2.0, theorem="a multiple", matrix=2.0 * np.eye(3))
    >>> doubled.apply([np.ones(3)])
    array([2., 2., 2.])
    """

    matrix: LinearMap = None
    bias: np.ndarray | None = None

    def _output_state(self, operands, norm, layout):
        (state,) = [state for state in operands if not state.is_fixed]
        gain = state.gain.scaled(self.constant)
        published = state.published.scaled(self.published)
        anchor, linear = state.root, linear_map.compose(state.linear, self.matrix)
        token_range = self.range or TokenRange()
        if state.range.bounded:
            # The radius is Euclidean whatever the norm of the certificate.
            size = self.constant if norm != "linf" else linear_map.matrix_norm(self.matrix, "l2")
            token_range = token_range.smaller(state.range.mapped(self.matrix, self.bias, size))
        if state.linear is not None and self.matrix is not None:
            merged = linear_map.matrix_norm(linear, norm)
            gain = gain.smaller(anchor.gain.scaled(merged))
            published = published.smaller(anchor.published.scaled(merged))
        activated = state.activated
        if activated is not None and self.matrix is not None:
            after = linear_map.compose(activated.after, self.matrix)
            activated = dataclasses.replace(activated, after=after)
            if after is not None and after.ndim == 2:
                first, slopes = activated.before, activated.slopes
                constant = activated_product_constant(first, after, slopes, norm)
                gain = gain.smaller(activated.root.gain.scaled(constant))
                published = published.smaller(activated.root.published.scaled(constant))
        return TensorState(
            gain=gain,
            published=published,
            range=token_range,
            anchor=anchor,
            linear=linear,
            activated=activated,
            routes=((state, self.matrix), (anchor, linear)),
            **layout,
        )

    def apply(self, values):
        if self.bias is not None and self.bias.ndim > 1:
            # The layer cuts it to the length of the input.
            return None
        (value,) = values
        if value is None:
            return None
        value = np.asarray(value, np.float64)
        if self.matrix is not None:
            value = value * self.matrix if self.matrix.ndim == 1 else value @ self.matrix
        return value if self.bias is None else value + self.bias


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Combination(LipschitzMap):
    """`sum_i coefficients[i] * operand i`, for operands of the shape of the output.

    Args:
        coefficients: numbers, or arrays of shape `(d,)`.

    Example:

    >>> from keras_lipattn.certification import Combination
    >>> mean = Combination(constant=2**-0.5, theorem="mean of two", coefficients=(0.5, 0.5))
    >>> mean.apply([np.ones(2), np.zeros(2)])
    array([0.5, 0.5])
    """

    coefficients: tuple[float | np.ndarray, ...] = ()

    def _output_state(self, operands, norm, layout):
        terms = list(zip(self.coefficients, operands, strict=True))
        width = layout["shape"][-1] if layout["shape"] else None
        total = None
        for coefficient, state in terms:
            term = state.repeated_range(width).mapped(
                of_coefficient(coefficient, width),
                None,
                largest_size(coefficient),
            )
            total = term if total is None else total.plus(term)
        groups: dict[int, list[tuple]] = {}
        for coefficient, state in terms:
            if not state.is_fixed:
                groups.setdefault(id(state.root), []).append((coefficient, state))
        gains, published = [], []
        merged_root, merged_map = None, None
        for members in groups.values():
            certified = Gain.summed(norm, [s.gain.scaled(largest_size(c)) for c, s in members])
            earlier = Gain.summed(norm, [s.published.scaled(largest_size(c)) for c, s in members])
            if width is not None:
                root = members[0][1].root
                maps = [linear_map.compose(s.linear, of_coefficient(c, width)) for c, s in members]
                linear = maps[0]
                for other in maps[1:]:
                    linear = linear_map.add(linear, other, width)
                if len(members) > 1:
                    constant = linear_map.matrix_norm(linear, norm)
                    certified = certified.smaller(root.gain.scaled(constant))
                    earlier = earlier.smaller(root.published.scaled(constant))
                if len(groups) == 1:
                    merged_root, merged_map = root, linear
            gains.append(certified)
            published.append(earlier)
        return TensorState(
            gain=Gain.summed(norm, gains),
            published=Gain.summed(norm, published),
            range=(self.range or TokenRange()).smaller(total or TokenRange()),
            anchor=merged_root,
            linear=merged_map,
            **layout,
        )

    def apply(self, values):
        if any(value is None for value in values):
            return None
        terms = [
            np.asarray(value, np.float64) * coefficient
            for value, coefficient in zip(values, self.coefficients, strict=True)
        ]
        return sum(terms[1:], terms[0])

    def error_weights(self, count):
        return [largest_size(coefficient) for coefficient in self.coefficients]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(LipschitzMap):
    """A function applied to every entry, with largest slope `constant`.

    Args:
        value_at_zero: upper bound of the absolute value of the function at 0.
        slopes: lower and upper bound of its slopes, by default `-constant` and `constant`.

    Example:

    >>> from keras_lipattn.certification import Elementwise
    >>> softplus = Elementwise(
    ...     constant=1.0, theorem="largest slope", value_at_zero=0.6932, slopes=(0.0, 1.0)
    ... )
    >>> softplus.constant
    1.0
    """

    value_at_zero: float
    slopes: tuple[float, float] | None = None

    def _output_state(self, operands, norm, layout):
        (state,) = [state for state in operands if not state.is_fixed]
        token_range = self.range or TokenRange()
        if state.range.bounded and state.width is not None:
            # A function of single entries has the same constant in every norm.
            token_range = token_range.smaller(
                TokenRange(
                    self.constant * state.range.outer_radius
                    + math.sqrt(state.width) * self.value_at_zero,
                    None,
                    self.constant * state.range.largest + self.value_at_zero,
                )
            )
        activated = None
        if state.linear is not None and state.linear.ndim == 2:
            slopes = self.slopes or (-self.constant, self.constant)
            activated = Activated(state.root, state.linear, slopes)
        return TensorState(
            gain=state.gain.scaled(self.constant),
            published=state.published.scaled(self.published),
            range=token_range,
            activated=activated,
            **layout,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenMixing(LipschitzMap):
    """A linear map over tokens that is the same for every channel (index of the last axis).

    It commutes with linear maps of the last axis, so those before and after it merge.

    Example:

    >>> from keras_lipattn.certification import TokenMixing
    >>> mean_of_16_tokens = TokenMixing(constant=0.25, theorem="mean over tokens", exact=True)
    >>> mean_of_16_tokens.constant
    0.25
    """

    def _output_state(self, operands, norm, layout):
        (state,) = [state for state in operands if not state.is_fixed]
        anchor, linear = None, None
        if state.anchor is not None:
            root, linear = state.anchor, state.linear
            width = None if linear is None else linear.shape[0]
            anchor = TensorState(
                gain=root.gain.scaled(self.constant),
                published=root.published.scaled(self.published),
                shape=(*layout["shape"][:-1], width or layout["shape"][-1]),
                dynamic=layout["dynamic"],
                fold=layout["fold"],
            )
        return TensorState(
            gain=state.gain.scaled(self.constant),
            published=state.published.scaled(self.published),
            range=self.range or TokenRange(),
            anchor=anchor,
            linear=linear,
            **layout,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Concatenation(LipschitzMap):
    """Linear images of one tensor, concatenated along the last axis.

    Example:

    >>> from keras_lipattn.certification import Concatenation
    >>> twice = Concatenation(constant=2**0.5, theorem="a tensor next to itself", exact=True)
    >>> round(twice.constant, 4)
    1.4142
    """

    def _output_state(self, operands, norm, layout):
        output = super()._output_state(operands, norm, layout)
        anchor = operands[0].root
        maps = [linear_map.as_matrix(state.linear, state.shape[-1] or 0) for state in operands]
        linear = np.concatenate(maps, axis=1)
        constant = linear_map.matrix_norm(linear, norm)
        return output.replace(
            gain=output.gain.smaller(anchor.gain.scaled(constant)),
            published=output.published.smaller(anchor.published.scaled(constant)),
            anchor=anchor,
            linear=linear,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Composite(LipschitzMap):
    """Maps that run one after the other; made by `chain`.

    Args:
        stages: the maps; `constant` may be smaller than the product of theirs.

    Example:

    >>> from keras_lipattn.certification import Composite, LipschitzMap
    >>> stages = LipschitzMap(constant=2.0), LipschitzMap(constant=3.0)
    >>> Composite(constant=5.0, theorem="both together", stages=stages).constant
    5.0
    """

    stages: tuple[LipschitzMap, ...] = ()

    def _output_state(self, operands, norm, layout):
        (state,) = [state for state in operands if not state.is_fixed]
        inner = state
        for stage in self.stages:
            inner = stage._output_state([inner], norm, layout)
        return inner.replace(
            gain=state.gain.scaled(self.constant).smaller(inner.gain),
            published=state.published.scaled(self.published).smaller(inner.published),
            range=(self.range or TokenRange()).smaller(inner.range),
        )


def chain(
    *stages: LipschitzMap, constant: float | None = None, theorem: str = "", **fields
) -> LipschitzMap:
    """The composition of maps, in the order in which they run.

    Args:
        *stages: the maps, each with one input.
        constant: constant of the composition; by default the product of the constants.
        theorem: theorem of the composition; by default the theorems of the maps.
        **fields: further fields of the composition.

    Returns:
        A `Composite`, or the map itself if there is only one and no other argument.

    Example:

    >>> from keras_lipattn.certification import LipschitzMap, chain
    >>> first = LipschitzMap(constant=2.0, theorem="first")
    >>> both = chain(first, LipschitzMap(constant=3.0, theorem="second"))
    >>> both.constant, both.theorem
    (6.0, 'first, then second')
    """
    if len(stages) == 1 and constant is None and not theorem and not fields:
        return stages[0]
    total, published = 1.0, 1.0
    for stage in stages:
        # An unbounded map makes the composition unbounded, even after a map of constant 0.
        total = math.inf if math.inf in (total, stage.constant) else total * stage.constant
        both = (published, stage.published)
        published = math.inf if math.inf in both else published * stage.published
    if constant is not None:
        total, published = min(total, constant), min(published, constant)
    names = dict.fromkeys(stage.theorem for stage in stages if stage.theorem)
    reasons = list(dict.fromkeys(Reason.of(stage.reason) for stage in stages if stage.reason))
    reason = Reason()
    if math.isinf(total):
        text = "; ".join(one.text for one in reasons)
        reason = dataclasses.replace(reasons[0], text=text)
    return Composite(
        constant=total,
        published=published,
        theorem=theorem or ", then ".join(names),
        reason=reason,
        stages=stages,
        **fields,
    )


def unbounded(reason: Reason | str, **fields) -> LipschitzMap:
    """The map of a call without a known constant.

    Args:
        reason: why there is none.
        **fields: other fields of `Reason`, such as `remedy`.

    Returns:
        A `LipschitzMap`.

    Example:

    >>> from keras_lipattn.certification import unbounded
    >>> layer_map = unbounded("it jumps at 0", remedy="use tanh")
    >>> layer_map.constant, str(layer_map.reason)
    (inf, 'it jumps at 0; use tanh')
    """
    return LipschitzMap(constant=math.inf, reason=dataclasses.replace(Reason.of(reason), **fields))


def side_by_side(norm: str, states: Sequence[TensorState], *, entrywise: bool = False):
    """Gains of several tensors taken as one: with the certified and with the published bounds."""
    return (
        Gain.stacked(norm, [state.gain for state in states], entrywise=entrywise),
        Gain.stacked(norm, [state.published for state in states], entrywise=entrywise),
    )
