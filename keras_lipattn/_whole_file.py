"""Atomic replacement of files."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

# A prefix, since the suffix determines the format.
_PREFIX = ".partial-"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Context that gives a path to write to, and replaces the file at `path` at the end.

    If the block raises, the file that it wrote is removed. A reader of `path` sees the whole old
    file or the whole new one, even if this process is killed. The next process that writes the same
    file overwrites what a killed one left. A device or a pipe is written directly.

    Args:
        path: Local path of the file to write.

    Yields:
        Path of a temporary file in the same folder.

    Raises:
        ValueError: If `path` is not local.
        OSError: If the block or the replacement raises one.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"Only a local file can be replaced atomically. Received: path={path!r}")
    # The target of a link, since a link itself would be replaced.
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    partial = target.with_name(_PREFIX + target.name)
    try:
        yield partial
        # Otherwise the name may reach the disk before the content.
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        message = f"{target} could not be written and is as it was. Received: {error}"
        raise (OSError(error.errno, message) if error.errno else OSError(message)) from error


def remove_partial(folder: pathlib.Path) -> None:
    """Removes temporary files of killed processes from a folder that one process writes to."""
    for partial in folder.glob(_PREFIX + "*"):
        partial.unlink(missing_ok=True)
