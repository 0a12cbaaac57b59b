"""Programs that are killed at random moments."""

import dataclasses
import multiprocessing
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.chaos.phase import read_phase, reset_phase

_POLL_SECONDS = 0.0005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """Moment of a kill.

    Attributes:
        phase: Prefix of the phase in which to kill, `""` for any phase.
        within: Largest number of seconds between the start of the phase and the kill.
        share: Weight of this aim in the random choice.
    """

    phase: str
    within: float
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a program ended.

    Attributes:
        killed: Whether it was killed.
        exit_code: Its exit code.
        phase: Its last phase.
        seconds: Its running time.
    """

    killed: bool
    exit_code: int | None
    phase: str
    seconds: float


class Programs:
    """Starts programs in separate processes, quickly.

    They are forked from a process that has only imported their modules.

    Args:
        modules: Names of the modules to import.
    """

    def __init__(self, *modules: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))

    def start(self, folder: pathlib.Path, program: Callable, *arguments: Any) -> Any:
        """Starts `program(folder, *arguments)`; returns the process."""
        process = self._context.Process(target=program, args=(folder, *arguments))
        process.start()
        return process

    def run(self, folder: pathlib.Path, program: Callable, *arguments: Any) -> Ending:
        """Runs `program(folder, *arguments)` to its end."""
        return self._run(folder, program, arguments, None, 0.0)

    def kill(
        self,
        folder: pathlib.Path,
        program: Callable,
        *arguments: Any,
        aim: Aim,
        random: np.random.Generator,
    ) -> Ending:
        """Runs it, and kills it by SIGKILL at a random moment unless it ends before."""
        return self._run(folder, program, arguments, aim.phase, aim.within * random.random())

    def _run(self, folder, program, arguments, phase, delay) -> Ending:
        reset_phase(folder)
        start = time.monotonic()
        process = self.start(folder, program, *arguments)
        killed = False
        if phase is not None:
            while process.is_alive() and not read_phase(folder).startswith(phase):
                time.sleep(_POLL_SECONDS)
            process.join(delay)
            killed = process.is_alive()
            process.kill()
        process.join()
        seconds = time.monotonic() - start
        # It may have ended just before the kill.
        killed = killed and process.exitcode == -9
        return Ending(
            killed=killed, exit_code=process.exitcode, phase=read_phase(folder), seconds=seconds
        )
