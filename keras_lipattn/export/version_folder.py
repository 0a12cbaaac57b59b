"""The next numbered version in the folder of a model, published by one rename.

```
directory/1/                                     a version, as TensorFlow Serving expects it
directory/.keras_lipattn-export-HOST-PID-xxxx/   an export in progress: a marker and model/
```
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator

# TensorFlow Serving reads only folders whose names are numbers.
_PREFIX = ".keras_lipattn-export-"
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<host>.+)-(?P<pid>\d{1,9})-\w{8}")
_MARKER = "written-by-keras_lipattn"
_MODEL = "model"
# Far more than an export takes. For processes of other hosts there is no other sign of their end.
_ABANDONED_AFTER_SECONDS = 24 * 3600


@contextlib.contextmanager
def staging_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Provide a folder to write a version to, on the file system of `directory`.

    The folder is removed at the end of the block unless `publish` has renamed it. Folders left by
    killed exports are removed first. If the block fails, `directory` is left as it was.

    Args:
        directory: Absolute path of the folder of the model. It is created if needed.

    Yields:
        Path of a folder that does not exist yet.

    Raises:
        OSError: If a folder cannot be created.
    """
    created = _make_folders(directory)
    try:
        _remove_abandoned(directory)
        prefix = f"{_PREFIX}{_host()}-{os.getpid()}-"
        holder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
        try:
            (holder / _MARKER).touch()
            yield holder / _MODEL
        finally:
            _remove(holder)
    except BaseException:
        for folder in reversed(created):
            # Not empty if another export has published a version in it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def publish(folder: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Rename a complete folder to the next free number.

    Args:
        folder: Path from `staging_folder`.
        directory: Folder of the model.

    Returns:
        Path of the version.

    Raises:
        OSError: If the contents cannot be flushed to disk, or the folder cannot be renamed.
    """
    _flush_all(folder)
    while True:
        version = directory / str(_next_number(directory))
        try:
            os.rename(folder, version)
        except OSError:
            if not os.path.lexists(version):
                raise
            # Another export took this number first.
        else:
            # The version is complete, also on file systems that cannot flush a folder.
            with contextlib.suppress(OSError):
                _flush(directory)
            return version


def _next_number(directory: pathlib.Path) -> int:
    return max((int(name) for name in os.listdir(directory) if name.isdecimal()), default=0) + 1


def _make_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Create a folder and its parents; return the ones that were missing, outermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    missing.reverse()
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


def _remove_abandoned(directory: pathlib.Path) -> None:
    for holder in directory.glob(_PREFIX + "*"):
        if _is_abandoned(holder):
            _remove(holder)


def _is_abandoned(holder: pathlib.Path) -> bool:
    name = _NAME.fullmatch(holder.name)
    if name is None:
        return False
    try:
        age = time.time() - holder.stat().st_mtime
    except OSError:  # Removed by its own export.
        return False
    if age > _ABANDONED_AFTER_SECONDS:
        return True
    return name["host"] == _host() and not _is_running(int(name["pid"]))


def _remove(holder: pathlib.Path) -> None:
    """Delete the files of an export, and the folder around them if nothing else is in it."""
    with contextlib.suppress(OSError):
        if (holder / _MARKER).is_file():
            shutil.rmtree(holder / _MODEL, ignore_errors=True)
            if not os.path.lexists(holder / _MODEL):
                (holder / _MARKER).unlink(missing_ok=True)
        # A process killed before it wrote the marker leaves an empty folder.
        holder.rmdir()


def _host() -> str:
    """Name of the machine, and on Linux of the container, in which process ids are unique."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}-{namespace}"


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        # There is no such question elsewhere: on Windows `os.kill` ends the process.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # A process of another user.
        return True
    return True


def _flush_all(folder: pathlib.Path) -> None:
    """Flush everything in a folder to disk, so that the rename never precedes the contents."""
    for root, _, files in os.walk(folder):
        for name in files:
            _flush(pathlib.Path(root, name))
        _flush(pathlib.Path(root))


def _flush(path: pathlib.Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
