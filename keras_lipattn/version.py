"""The package's version: the one place that states it (`setup.cfg` reads it from here)."""

__version__ = "1.0.0rc1"
