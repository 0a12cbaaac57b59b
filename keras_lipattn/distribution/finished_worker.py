"""A worker that ended."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FinishedWorker:
    """A worker that ended.

    Attributes:
        returncode: Its exit status, or minus the signal that ended it.
        output: What it wrote to standard output and standard error.
        killed: Whether it had to be killed.
    """

    returncode: int
    output: str
    killed: bool
