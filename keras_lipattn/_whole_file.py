"""Atomic replacement of files."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from keras_lipattn._temporary_names import abandoned, temporary_name

_PURPOSE = "partial"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Context that gives a path to write to, and replaces the file at `path` at the end.

    If the block raises, the file that it wrote is removed. A reader of `path` sees the whole old
    file or the whole new one, even if this process is killed. Several
    processes may write the same file: the last one to finish replaces it. Temporary files that
    killed processes left in the folder are removed. A device or a pipe is written directly.

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
    # The suffix determines the format.
    partial = target.with_name(temporary_name(_PURPOSE) + target.suffix)
    try:
        for left in abandoned(target.parent, _PURPOSE):
            left.unlink(missing_ok=True)
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
