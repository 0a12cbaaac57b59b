"""What the caller of `certify` decided."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller of `certify` decided."""

    norm: str
    sequence_length: int | None
    input_radius: float | None
    assume_fixed_mask: bool
    mask: Any
