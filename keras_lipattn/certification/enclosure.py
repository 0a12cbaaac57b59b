"""Where a tensor is when the input of a model stays near a given one."""

import dataclasses

import numpy as np

from keras_lipattn.certification.token_range import TokenRange


@dataclasses.dataclass(frozen=True, eq=False)
class Enclosure:
    """The value of a tensor at the center of a local certificate, and how far it can be from it.

    Args:
        value: the tensor at the center, for one example, float64 where it is a float.
        radius: for every input in the ball, the tensor is within this distance of `value` in the
            2-norm of all entries, `rounding_error` included.
        rounding_error: how far `value` may be from the tensor of real arithmetic with the weights
            used at inference: their roundings, and those of the evaluation.
    """

    value: np.ndarray
    radius: float = 0.0
    rounding_error: float = 0.0

    @property
    def size(self) -> float:
        """2-norm of the value."""
        return float(np.linalg.norm(np.asarray(self.value, np.float64)))

    @property
    def range(self) -> TokenRange:
        """A ball that contains every token of the tensor."""
        # Numbers without an axis of their own are tokens of one entry.
        tokens = TokenRange.of_values(self.value if self.value.ndim > 1 else self.value[..., None])
        if not tokens.bounded:
            return tokens
        return TokenRange(tokens.radius + self.radius, tokens.center, tokens.largest + self.radius)
