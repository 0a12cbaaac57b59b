"""Numbers and names as they are printed."""

import math


def number(value: float) -> str:
    """A number with four digits."""
    if math.isinf(value):
        return "inf"
    return f"{value:.4g}" if 1e-3 <= value < 1e5 or value == 0.0 else f"{value:.2e}"


def shorten(name: str, width: int) -> str:
    """A name of at most `width` characters. The end of a path says the most."""
    return name if len(name) <= width else "..." + name[3 - width :]
