"""What a conversion gives back."""

import dataclasses
from collections.abc import Mapping

import keras


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """A model whose attention was replaced, and how far its outputs are from the original's.

    Args:
        model: The new model.
        replaced: Paths of the layers that were replaced, such as `"encoder/attention"`, in the
            order in which Keras lists layers.
        kept: From the paths of the attention layers that stay as they are to why.
        relative_error: `|new(x) - old(x)| / |old(x)|` at inference, in the 2-norm over all entries
            of all outputs on the batch that was given; `None` without one. A measurement on that
            batch, not a bound.
    """

    model: keras.Model
    replaced: tuple[str, ...]
    kept: Mapping[str, str]
    relative_error: float | None
