"""A real file system of one megabyte, to be filled or made read-only."""

import pathlib
import subprocess

import pytest


class SmallDisk:
    """A mounted file system.

    Args:
        folder: Where it is mounted.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def fill(self, *, leaving: int) -> None:
        """Fills it up to so many bytes."""
        filler = self.folder / "filler"
        with open(filler, "wb") as file:
            try:
                while file.write(bytes(4096)):
                    file.flush()
            except OSError:
                pass
            file.raw.truncate(filler.stat().st_size - leaving)

    def empty(self) -> None:
        """Makes room again."""
        (self.folder / "filler").unlink()

    def make_read_only(self) -> None:
        """From now on it cannot be written, by root neither."""
        _run("mount", "-o", "remount,ro", str(self.folder))


def mounted(folder: pathlib.Path):
    """A fresh `SmallDisk`, unmounted afterwards; skips where nobody may mount."""
    done = _run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder), check=False)
    if done.returncode:
        pytest.skip(f"mounting a file system needs root. Received: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", str(folder))


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=check, capture_output=True, text=True)
