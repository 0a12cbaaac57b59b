"""The error of a check that fails."""


class NotVerified(Exception):
    """An export that is not verified.

    Args:
        reason: Why, in one line.
    """

    def __init__(self, reason: str):
        self.reason = " ".join(reason.split())
        super().__init__(self.reason)


def require(condition: bool, reason: str) -> None:
    """Raise `NotVerified` with this reason unless the condition holds."""
    if not condition:
        raise NotVerified(reason)
