"""Check of the installed requirements, before anything that imports them."""

import importlib.metadata
import re

# As in setup.cfg. The checks of TensorFlow are left to Keras: other backends do not need it.
_OLDEST = {"keras": "3.15", "numpy": "2", "scipy": "1.13"}


def check_requirements() -> None:
    """Check that the requirements are installed and new enough.

    Raises:
        ImportError: If one is missing or too old. The message says how to install it.
    """
    for name, oldest in _OLDEST.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or _numbers(found) < _numbers(oldest):
            received = f"{name} {found}" if found else f"no {name}"
            raise ImportError(
                f"keras_lipattn needs {name} {oldest} or newer: run "
                f"`pip install '{name}>={oldest}'`. Received: {received}"
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
