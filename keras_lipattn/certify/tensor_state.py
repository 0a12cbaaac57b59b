"""What is known about a tensor of the graph."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from keras_lipattn.certify.domain import Domain
from keras_lipattn.certify.gain import Gain
from keras_lipattn.certify.linear_map import LinearMap
from keras_lipattn.certify.near import Near


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TensorState:
    """A tensor of the graph, as the walk sees it.

    Args:
        gain: its constant with respect to the certified inputs.
        published: the same, with the published bound for every attention layer.
        shape: sizes of the axes without the batch axis; the largest ones where they vary,
            `None` where nothing is known.
        dynamic: for each of these axes whether the size varies from call to call.
        dtype: its dtype, a string.
        domain: where its tokens can be.
        anchor: a tensor from which this one follows by a linear map of the last axis plus a
            constant; `None` means the tensor itself.
        linear: that map.
        routes: pairs of an earlier tensor and a linear map from it to this one, the last linear
            layer first.
        masked: whether a Keras mask may travel with the tensor.
        discrete: number of the integer input which it repeats unchanged, `None` if it is not
            made of integers.
        held: whether the tensor does not move when the certified inputs do.
        derived: whether it does not move but follows from an integer input.
        values: its values where they are constants of the model.
        costs: for each row of the certificate its part of the logarithm of `gain`.
        near: where it is near the input that a local certificate is for, `None` if not known.
    """

    gain: Gain
    published: Gain
    shape: tuple[int | None, ...]
    dynamic: tuple[bool, ...]
    dtype: str = "float32"
    domain: Domain = dataclasses.field(default_factory=Domain)
    anchor: "TensorState | None" = None
    linear: LinearMap = None
    routes: "tuple[tuple[TensorState, LinearMap], ...]" = ()
    masked: bool = False
    discrete: int | None = None
    held: bool = False
    derived: bool = False
    values: np.ndarray | None = None
    costs: Mapping[int, float] = dataclasses.field(default_factory=dict)
    near: Near | None = None

    @property
    def root(self) -> "TensorState":
        """The tensor which the linear map starts from."""
        return self if self.anchor is None else self.anchor

    @property
    def width(self) -> int | None:
        """Size of the last axis, `None` when it is not known or there is no axis."""
        return self.shape[-1] if self.shape and not self.dynamic[-1] else None

    @property
    def tokens(self) -> int | None:
        """Largest number of tokens: the product of all axes but the batch and the last one."""
        return product(self.shape[:-1])

    @property
    def fewest_tokens(self) -> int | None:
        """Smallest number of tokens; axes that vary may have size 1."""
        return product(
            tuple(
                1 if varies else size
                for size, varies in zip(self.shape[:-1], self.dynamic[:-1], strict=True)
            )
        )

    @property
    def entries(self) -> int | None:
        """Largest number of entries."""
        return product(self.shape)

    def replace(self, **changes) -> "TensorState":
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)


def product(sizes: tuple[int | None, ...]) -> int | None:
    """Product of the sizes, `None` when one of them is not known."""
    total = 1
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total
