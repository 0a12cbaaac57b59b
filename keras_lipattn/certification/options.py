"""The arguments of `certify` that a propagation depends on."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of `certify`."""

    norm: str = "l2"
    sequence_length: int | None = None
    input_radius: float | None = None
    assume_fixed_mask: bool = False
    mask: Any = None
