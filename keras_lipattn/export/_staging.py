"""Publishing a folder in one step, or not at all."""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows: what a killed export left behind is not cleaned up there.
    fcntl = None

# TensorFlow Serving looks only at folders whose names are numbers.
_PREFIX = ".export-"
_OLD = "old"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def staged(target: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """A folder that becomes `target` when the block ends well, and vanishes when it does not.

    It lies beside `target`, so that the last step is a rename: whoever reads `target` sees all of
    the old one or all of the new one, also when this process is killed. What killed processes left
    behind is removed by the next one. Where the system cannot swap two folders in one step, a kill
    between two renames leaves the old one hidden, and the next process puts it back.

    Args:
        target: Absolute path of the folder to publish; its parents are created.
        overwrite: Whether `target` may be replaced.

    Yields:
        Path of a folder which does not exist yet.

    Raises:
        OSError: If the folder cannot be created, renamed, or has appeared meanwhile.
    """
    created = _make_parents(target.parent)
    try:
        _remove_abandoned(target.parent)
        with _locked_folder(target.parent) as shelter:
            folder = shelter / "model"
            yield folder
            _flush(folder)
            _publish(folder, target, shelter, overwrite)
    except BaseException:
        for parent in reversed(created):
            # Another export may have put its own result there.
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _publish(folder, target, shelter, overwrite):
    if not (overwrite and os.path.lexists(target)):
        # Fails when another export has filled the target since it was checked.
        os.rename(folder, target)
    elif not _exchange(folder, target):
        # Under its own name, by which it is put back after a kill in between.
        old = shelter / _OLD / target.name
        old.parent.mkdir()
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)
            raise
    _flush_one(target.parent)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two paths in one step; false where the system cannot."""
    renameat2 = None
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _make_parents(folder: pathlib.Path) -> list[pathlib.Path]:
    """Creates a folder and those above it; returns the ones that were missing, outermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    missing.reverse()
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


@contextlib.contextmanager
def _locked_folder(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder which others know to be in use, as the lock dies with this process."""
    while True:
        shelter = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with _lock(shelter, wait=True):
            # Whoever cleans up may have seen it in the moment before it was locked.
            if not shelter.exists():
                continue
            try:
                yield shelter
            finally:
                shutil.rmtree(shelter, ignore_errors=True)
            return


def _remove_abandoned(parent: pathlib.Path) -> None:
    for shelter in parent.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError), _lock(shelter, wait=False) as locked:
            if locked:
                for old in shelter.glob(f"{_OLD}/*"):
                    if not os.path.lexists(parent / old.name):
                        os.rename(old, parent / old.name)
                shutil.rmtree(shelter, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: pathlib.Path, *, wait: bool) -> Iterator[bool]:
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:  # In use, or a file system without locks.
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _flush(folder: pathlib.Path) -> None:
    """Sees everything in a folder onto the disk, so that a rename never precedes its contents."""
    for root, _, files in os.walk(folder):
        for name in files:
            _flush_one(pathlib.Path(root, name))
        _flush_one(pathlib.Path(root))


def _flush_one(path: pathlib.Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
