"""The next numbered version in the folder of a model, published by one rename.

```
directory/1/                                     a version, as TensorFlow Serving expects it
directory/.keras_lipattn-export-HOST-PID-xxxx/   an export in progress: a marker and model/
```
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from keras_lipattn._temporary_names import abandoned, temporary_name

# The names are hidden: TensorFlow Serving reads only folders whose names are numbers.
_PURPOSE = "export"
_MARKER = "written-by-keras_lipattn"
_MODEL = "model"


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
        for holder in abandoned(directory, _PURPOSE):
            _remove(holder)
        holder = directory / temporary_name(_PURPOSE)
        holder.mkdir(mode=0o700)
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


def _remove(holder: pathlib.Path) -> None:
    """Delete the files of an export, and the folder around them if nothing else is in it."""
    with contextlib.suppress(OSError):
        if (holder / _MARKER).is_file():
            shutil.rmtree(holder / _MODEL, ignore_errors=True)
            if not os.path.lexists(holder / _MODEL):
                (holder / _MARKER).unlink(missing_ok=True)
        # A process killed before it wrote the marker leaves an empty folder.
        holder.rmdir()


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
