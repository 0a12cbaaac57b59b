"""One row of a certificate: one call of a layer."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificateRow:
    """What a certificate says about one call of a layer.

    Args:
        path: names of the models and layers on the way to the call, joined by "/"; unique in the
            certificate. A layer that is called again gets ":call2" and so on; of different layers
            of one name in a subclassed model the second has "#2".
        layer: class of the layer, or of the node of `keras.ops`.
        constant: Lipschitz constant of the call alone, in the norm of the certificate, with
            respect to its inputs side by side.
        published: the same by the earlier published bound, where there is one.
        radius: radius of the ball that holds the tokens of its input, `inf` if none is known.
        tokens: largest number of tokens of its input, `None` if it is not known.
        theorem: where the constant comes from.
        reason: why it is `inf` and what to do, in one line.
        replacement: for a row that is `inf`, what to use in place of the layer, if that helps.
        exact: whether the constant is attained or approached by the call alone.
        cost: what the call adds to the natural logarithm of the total. The costs of all rows
            sum to it: those of the branches of a sum count by their weight in the sum, and
            the sum itself pays for having several.
        explained_by: for a row that is `inf` only because of another row, the path of that row.
    """

    path: str
    layer: str
    constant: float
    published: float
    radius: float = math.inf
    tokens: int | None = None
    theorem: str = ""
    reason: str = ""
    replacement: str = ""
    exact: bool = False
    cost: float = 0.0
    explained_by: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether the row says anything at all."""
        return math.isfinite(self.constant)
