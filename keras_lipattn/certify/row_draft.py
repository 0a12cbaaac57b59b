"""A row of a certificate in the making."""

import dataclasses


@dataclasses.dataclass
class RowDraft:
    """A row of the certificate in the making."""

    path: str
    layer_class: str
    constant: float
    published: float
    radius: float
    tokens: int | None
    theorem: str
    reason: str
    exact: bool
