"""Kills trainings at random moments and reports the results."""

import pathlib
import time

import numpy as np

from tools.chaos.trainings import Kill, Trainings

_ROW = "{:>4}  {:>7}  {:>8}  {:<28}  {:>6}  {}"


def attack(
    folder: pathlib.Path, *, kills: int, seed: int, minutes: float, epochs: int, whose: str
) -> int:
    """Kills trainings and prints a table with the phase of each kill.

    Args:
        folder: Folder of the trainings.
        kills: Number of kills.
        seed: Seed of the moments.
        minutes: Time after which no further training is started.
        epochs: Number of epochs of a training.
        whose: Which callbacks write: `"durable"`, `"keras"`, `"managed"` or `"orbax"`.

    Returns:
        Exit code: 1 after any problem, or if time is up before the last kill.
    """
    print(f"seed {seed}, {kills} kills, callbacks: {whose}", flush=True)
    end = time.monotonic() + 60.0 * minutes
    trainings = Trainings(
        folder,
        epochs=epochs,
        callbacks=whose,
        random=np.random.default_rng(seed),
    )
    problems = trainings.train_whole()
    fallen: list[Kill] = []
    count = 0
    print(_ROW.format("kill", "seconds", "training", "while it was", "backup", "found"))
    while len(fallen) < kills and time.monotonic() < end:
        count += 1
        done, at_the_end = trainings.train_interrupted(kills - len(fallen))
        for kill in done:
            fallen.append(kill)
            problems += kill.problems
            print(_line(len(fallen), count, kill), flush=True)
        verdict = "; ".join(at_the_end) or "equal to the whole training, bit for bit"
        print(f"training {count} ended: {verdict}", flush=True)
        problems += at_the_end
    if len(fallen) < kills:
        problems.append(f"only {len(fallen)} kills in {minutes:g} minutes")
    print(f"seed {seed}: {len(fallen)} kills, {count} trainings, {len(problems)} violations")
    return 1 if problems else 0


def _line(number: int, count: int, kill: Kill) -> str:
    found = "; ".join(kill.problems) or "whole"
    seconds = f"{kill.ending.seconds:.2f}"
    return _ROW.format(number, seconds, count, kill.ending.phase, kill.backed_up, found)
