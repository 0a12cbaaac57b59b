"""A real file system of one megabyte that can be filled or made read-only."""

import pathlib
import subprocess

import pytest


class SmallDisk:
    """A mounted file system.

    Args:
        folder: Mount point.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def fill(self, *, leaving: int) -> None:
        """Fill it, except for `leaving` bytes."""
        filler = self.folder / "filler"
        with open(filler, "wb") as file:
            try:
                while file.write(bytes(4096)):
                    file.flush()
            except OSError:
                pass
            file.raw.truncate(filler.stat().st_size - leaving)

    def empty(self) -> None:
        """Delete what `fill` has written."""
        (self.folder / "filler").unlink()

    def make_read_only(self) -> None:
        """Make it read-only, also for root."""
        _run("mount", "-o", "remount,ro", str(self.folder))


def mounted(folder: pathlib.Path):
    """A new `SmallDisk`, unmounted at the end. Skips the test if mounting is not allowed."""
    done = _run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder), check=False)
    if done.returncode:
        pytest.skip(f"mounting a file system needs root. Received: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", str(folder))


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=check, capture_output=True, text=True)
