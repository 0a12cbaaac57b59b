"""Phase of a program, written so that it survives a kill."""

import os
import pathlib

_WIDTH = 64
_APPENDING = os.O_CREAT | os.O_WRONLY | os.O_APPEND


class Phase:
    """Writes the phases and epochs of a program to files.

    Args:
        folder: Folder of the files `phase` and `journal`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._phase = os.open(folder / "phase", os.O_CREAT | os.O_WRONLY, 0o644)
        self._journal = os.open(folder / "journal", _APPENDING, 0o644)

    def __del__(self) -> None:
        os.close(self._phase)
        os.close(self._journal)

    def tell(self, phase: str) -> None:
        # One system call of fixed size, which a kill cannot interrupt.
        os.pwrite(self._phase, phase.ljust(_WIDTH).encode()[:_WIDTH], 0)

    def record(self, epoch: int) -> None:
        """Adds an epoch that starts to the journal."""
        os.write(self._journal, f"{os.getpid()} {epoch}\n".encode())


def reset_phase(folder: pathlib.Path) -> None:
    """Discards the phase of an earlier program."""
    Phase(folder).tell("starting")


def read_phase(folder: pathlib.Path) -> str:
    """The last phase."""
    path = folder / "phase"
    return path.read_text().strip() if path.exists() else ""


def read_journal(folder: pathlib.Path) -> list[tuple[int, int]]:
    """Pairs of a process and an epoch that it started, in order."""
    path = folder / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(process), int(epoch)) for process, epoch in (line.split() for line in lines)]
