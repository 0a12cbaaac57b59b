"""The package's version: the one place that states it (`setup.cfg` reads it from here)."""

__version__ = "0.1.0"
