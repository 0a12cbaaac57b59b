"""Where a tensor is when the input stays near a given one."""

import dataclasses

import numpy as np

from keras_lipattn.certify.domain import Domain


@dataclasses.dataclass(frozen=True, eq=False)
class Near:
    """The value of a tensor at the centre of a local certificate, and how far it can be from it.

    Args:
        value: the tensor at the centre, shape `(1, ...)`, float64 where it is a float.
        radius: for every input in the ball, the tensor is within this distance of `value` in the
            2-norm of all entries, `drift` included.
        drift: how far `value` may be from the tensor of real arithmetic with the weights as they
            run: their roundings, and those of the evaluation.
        mask: the Keras mask that travels with it, shape `(1, ...)`, or `None`.
    """

    value: np.ndarray
    radius: float = 0.0
    drift: float = 0.0
    mask: np.ndarray | None = None

    @property
    def size(self) -> float:
        """2-norm of the value."""
        return float(np.linalg.norm(np.asarray(self.value, np.float64)))

    @property
    def domain(self) -> Domain:
        """A ball that contains every token of the tensor."""
        tokens = Domain.of_values(self.value[0])
        if not tokens.bounded:
            return tokens
        return Domain(tokens.radius + self.radius, tokens.centre, tokens.largest + self.radius)
