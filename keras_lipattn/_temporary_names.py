"""Names of temporary files and folders that say which process writes them."""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator

_NAME = re.compile(r"\.keras_lipattn-(?P<purpose>[a-z]+)-(?P<host>.+)-(?P<pid>\d{1,9})-[0-9a-f]{8}")
# Far longer than any file takes. For processes of other hosts there is no other sign of their end.
_ABANDONED_AFTER_SECONDS = 24 * 3600


def temporary_name(purpose: str) -> str:
    """A new hidden name for a file or folder of this process.

    Args:
        purpose: One word of lowercase letters.
    """
    return f".keras_lipattn-{purpose}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def abandoned(folder: pathlib.Path, purpose: str) -> list[pathlib.Path]:
    """Paths in `folder` with a temporary name of this purpose whose process has ended.

    Args:
        folder: An existing folder.
        purpose: As given to `temporary_name`. The name may be followed by a suffix such as `.npz`.
    """
    paths = folder.glob(f".keras_lipattn-{purpose}-*")
    return [path for path in paths if _is_abandoned(path, purpose)]


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[pathlib.Path]:
    """Context with a new folder in the temporary folder of the system, removed at the end.

    Folders of the same purpose that killed processes left there are removed first.

    Args:
        purpose: As for `temporary_name`.

    Yields:
        Path of the folder.
    """
    parent = pathlib.Path(tempfile.gettempdir())
    for left in abandoned(parent, purpose):
        # Folders of other users cannot be removed, and links are not followed.
        shutil.rmtree(left, ignore_errors=True)
    folder = parent / temporary_name(purpose)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(path: pathlib.Path, purpose: str) -> bool:
    name = _NAME.match(path.name)
    if name is None or name["purpose"] != purpose or path.name[name.end() :][:1] not in ("", "."):
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:  # Removed by its own process.
        return False
    if age > _ABANDONED_AFTER_SECONDS:
        return True
    return name["host"] == _host() and not _is_running(int(name["pid"]))


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
