"""What a conversion gives back."""

import dataclasses

import keras


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """A model whose attention was replaced, and how far its outputs are from the original's.

    Args:
        model: The new model.
        replaced: Names of the layers that were replaced, in the order of the graph.
        relative_error: `|new(x) - old(x)| / |old(x)|` at inference, in the 2-norm over all entries
            of all outputs on the batch that was given; `None` without one. A measurement on that
            batch, not a bound.
    """

    model: keras.Model
    replaced: tuple[str, ...]
    relative_error: float | None
