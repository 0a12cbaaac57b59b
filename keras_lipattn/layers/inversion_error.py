"""The error of an inverse that was not found."""


class InversionError(ArithmeticError):
    """An inverse did not reach its tolerance; the message says what was reached and what to try."""
