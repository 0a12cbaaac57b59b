"""The error of an export that was refused or failed."""


class ExportError(RuntimeError):
    """An export was refused, or failed on its way. Nothing was published."""
