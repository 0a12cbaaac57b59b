"""What a rule says about one call of a layer."""

import dataclasses
import math

import numpy as np

from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.linear_map import LinearMap
from keras_lipattn.certify.tensor_state import TensorState


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """A proven statement about one call of a layer, or about one part of it.

    Only `constant` and `theorem` are needed (and `reason` when the constant is `inf`); the
    other fields let the walk combine the layer with its neighbours more tightly.

    Args:
        constant: Lipschitz constant in the norm of the certificate, with respect to all
            varying inputs side by side. NaN counts as `inf`.
        theorem: where the number comes from, in a few words.
        reason: why nothing finite is known.
        published: the constant by the published bound, where it differs; NaN stands for the same.
        exact: whether the constant is attained or approached.
        operands: the tensors that `gains` and `coefficients` speak of; by default all tensors
            of the call in order.
        entrywise: whether the entries of several inputs meet within a token, as in a
            concatenation along the last axis.
        gains: numbers with `|change| <= sum_i gains[i] |change of operand i|`.
        coefficients: the layer is `sum_i coefficients[i] * operand i`, where a coefficient is a
            number or an array of shape `(d,)`.
        matrix: if `is_linear_map`, the layer is this linear map of the last axis plus `bias`.
        is_linear_map: see `matrix`.
        bias: shape `(d_out,)`.
        mixes_tokens: whether the layer is linear and treats every channel (index of the last
            axis) alike, so that it commutes with linear maps of the last axis.
        stages: parts which, one after the other, make up the layer; `constant` may be
            smaller than the product of theirs.
        domain: where the tokens of the output can be, as far as the layer itself tells.
        concatenates: the layer puts its operands side by side along the last axis.
        longest: largest number of tokens for which the constant holds.
        entry_offset: the layer is a function of one entry with at most this absolute value at 0.
        keeps_mask: whether a mask of the input may travel on with the output.
        starts: whether the output is itself the certified input.
        adds_mask: whether the output carries a mask of the layer's own making.
        assumes_fixed_mask: whether the step is only true for a mask that does not move.
        value: for a local certificate the output at its centre, where the rule knows it best.
        drift: how far `value` may be from what runs, in the 2-norm, for that input.
        lost: why nobody knows the output at the centre.

    Raises:
        ValueError: if `constant` is `inf` and there is no `reason`.
    """

    constant: float
    theorem: str = ""
    reason: str = ""
    published: float = math.nan
    exact: bool = False
    operands: tuple[TensorState, ...] | None = None
    entrywise: bool = False
    gains: tuple[float, ...] | None = None
    coefficients: tuple[float | np.ndarray, ...] | None = None
    matrix: LinearMap = None
    is_linear_map: bool = False
    bias: np.ndarray | None = None
    mixes_tokens: bool = False
    stages: "tuple[Step, ...]" = ()
    domain: Domain | None = None
    concatenates: bool = False
    longest: int | None = None
    entry_offset: float | None = None
    keeps_mask: bool = True
    starts: bool = False
    adds_mask: bool = False
    assumes_fixed_mask: bool = False
    value: np.ndarray | None = None
    drift: float = 0.0
    lost: str = ""

    def __post_init__(self):
        constant = float(self.constant)
        if math.isnan(constant) or constant < 0.0:
            # Arithmetic on weights that are not numbers ends here, never in a certificate.
            constant = math.inf
        object.__setattr__(self, "constant", constant)
        if math.isnan(self.published):
            object.__setattr__(self, "published", constant)
        if math.isinf(constant) and not self.reason:
            raise ValueError(
                "A rule without a finite constant must say why in `reason`. "
                f"Received: constant={self.constant}, reason={self.reason!r}"
            )

    @classmethod
    def chain(cls, *stages: "Step", constant: float | None = None, theorem: str = "", **fields):
        """A layer made of parts that run one after the other.

        Args:
            *stages: the parts.
            constant: of the whole; by default the product of the constants of the parts.
            theorem: of the whole; by default those of the parts.
            **fields: further fields of the whole.

        Returns:
            A `Step`.
        """
        if len(stages) == 1 and constant is None and not theorem and not fields:
            return stages[0]
        product, published = 1.0, 1.0
        for stage in stages:
            # An unbounded part makes the whole unbounded, even next to a part of constant 0.
            product = (
                math.inf if math.inf in (product, stage.constant) else product * stage.constant
            )
            published = (
                math.inf
                if math.inf in (published, stage.published)
                else published * stage.published
            )
        if constant is not None:
            product, published = min(product, constant), min(published, constant)
        names = dict.fromkeys(stage.theorem for stage in stages if stage.theorem)
        reasons = dict.fromkeys(stage.reason for stage in stages if stage.reason)
        return cls(
            constant=product,
            published=published,
            theorem=theorem or ", then ".join(names),
            reason="; ".join(reasons) if math.isinf(product) else "",
            stages=stages,
            keeps_mask=all(stage.keeps_mask for stage in stages),
            **fields,
        )
