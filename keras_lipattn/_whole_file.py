"""Writing a file as a whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

# The ending of the name stays: it chooses the format.
_PREFIX = ".partial-"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path to write to: the file becomes `path` when the block ends well, and vanishes otherwise.

    Whoever reads `path` sees all of the old file or all of the new one, also when this process is
    killed. What a killed one left is overwritten by the next one that writes the same file. A
    device or pipe is written to as it is.

    Args:
        path: Local path of the file to write.

    Yields:
        Path of a file beside it.

    Raises:
        ValueError: If `path` is not local.
        OSError: If the block, or the renaming, raises one.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"Only a local file can be replaced in one step. Received: path={path!r}")
    # Through links, which would be replaced themselves.
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    partial = target.with_name(_PREFIX + target.name)
    try:
        yield partial
        # Else the name may reach the disk before the content.
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
    """Removes what killed processes left behind in a folder that nobody else writes to."""
    for partial in folder.glob(_PREFIX + "*"):
        partial.unlink(missing_ok=True)
