"""Trainings that are killed and run again until they end."""

import dataclasses
import pathlib

import numpy as np

from tools.chaos import inspection
from tools.chaos.killing import Aim, Ending, Programs
from tools.chaos.training import run

# Training takes most of the time, but kills are most dangerous during writes.
AIMS = (
    Aim(phase="building", within=2.0, share=1.0),
    Aim(phase="training epoch {epoch}", within=0.3, share=3.0),
    Aim(phase="certifying epoch {epoch}", within=0.05, share=1.0),
    Aim(phase="writing history of epoch {epoch}", within=0.005, share=2.0),
    Aim(phase="writing checkpoint of epoch {epoch}", within=0.1, share=3.0),
    Aim(phase="writing backup of epoch {epoch}", within=0.05, share=4.0),
    Aim(phase="finishing", within=0.02, share=0.5),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """One run of a training that was killed.

    Attributes:
        ending: Its ending.
        backed_up: Number of epochs in the backup afterwards.
        problems: Problems of its files afterwards.
    """

    ending: Ending
    backed_up: int
    problems: list[str]


class Trainings:
    """Trainings in separate folders, compared with an uninterrupted one.

    Args:
        folder: Parent of the folders.
        epochs: Number of epochs of each training.
        callbacks: Which callbacks write, as in `attack`.
        random: Generator of the moments.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        epochs: int,
        callbacks: str,
        random: np.random.Generator,
    ) -> None:
        self._programs = Programs("tools.chaos.training")
        self._folder, self._epochs, self._callbacks = folder, epochs, callbacks
        self._random = random
        self._count = 0
        self._whole = folder / "whole"

    def train_whole(self) -> list[str]:
        """Trains without interruption; returns a list of problems."""
        ending = self._programs.run(self._whole, run, self._epochs, self._callbacks)
        return self._at_the_end(self._whole, ending)

    def train_interrupted(self, kills: int) -> tuple[list[Kill], list[str]]:
        """Trains with at most `kills` kills.

        Returns:
            A pair: the `Kill`s, which are fewer if the training ends before, and the problems at
            the end.
        """
        self._count += 1
        folder = self._folder / f"interrupted-{self._count}"
        done: list[Kill] = []
        while len(done) < kills:
            before = done[-1].backed_up if done else 0
            aim = self._aim(before)
            ending = self._programs.kill(
                folder, run, self._epochs, self._callbacks, aim=aim, random=self._random
            )
            if not ending.killed:
                return done, self._at_the_end(folder, ending)
            done.append(self._after_kill(folder, ending, before))
        ending = self._programs.run(folder, run, self._epochs, self._callbacks)
        return done, self._at_the_end(folder, ending)

    def _aim(self, backed_up: int) -> Aim:
        """Random aim in one of the next epochs."""
        shares = np.array([aim.share for aim in AIMS])
        aim = AIMS[self._random.choice(len(AIMS), p=shares / shares.sum())]
        epoch = min(backed_up + int(self._random.integers(1, 4)), self._epochs)
        return dataclasses.replace(aim, phase=aim.phase.format(epoch=epoch))

    def _after_kill(self, folder: pathlib.Path, ending: Ending, before: int) -> Kill:
        problems = inspection.broken_files(folder)
        backed_up = before
        if not problems:
            backed_up = inspection.epochs_backed_up(folder)
            if backed_up < before:
                problems.append(f"the backup went from {before} epochs to {backed_up}")
        problems += inspection.wrong_rows(folder, backed_up)
        return Kill(ending=ending, backed_up=backed_up, problems=problems)

    def _at_the_end(self, folder: pathlib.Path, ending: Ending) -> list[str]:
        if ending.exit_code:
            return [f"the training failed in phase {ending.phase!r}, exit code {ending.exit_code}"]
        problems = [
            *inspection.broken_files(folder),
            *inspection.wrong_rows(folder, self._epochs),
            *inspection.lost_epochs(folder, self._epochs),
            *(f"{path.name} was left behind" for path in folder.rglob(".keras_lipattn-*")),
        ]
        if inspection.epochs_backed_up(folder) != self._epochs:
            problems.append(f"the backup holds {inspection.epochs_backed_up(folder)} epochs")
        if not problems and folder != self._whole:
            problems = inspection.differences(folder, self._whole)
        return problems
