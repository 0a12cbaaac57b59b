"""Kills trainings at random moments, runs them again, and compares the end with a whole one.

    python -m tools.chaos --kills=20 --seed=0 --minutes=15

A program that trains on handwritten digits is killed by SIGKILL while it starts, trains, certifies
or writes, and run again until it ends, as often as it takes to reach the number of kills. After
each kill every file must be whole and no epoch lost; at the end history, weights, running vectors,
penalty coefficient, state of the optimizer and of random numbers must equal, bit for bit, those of
a training that nobody killed. A table tells where each kill fell.

Exit codes: 0 all of that held, 1 anything did not, or time was up before the last kill.
--whose=keras does the same to Keras' own callbacks, which do not stand it.
"""

import os
import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags

from tools.chaos.trainings import Kill, Trainings

_KILLS = flags.DEFINE_integer("kills", 20, "Number of kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Seed of the moments; by default a new one.")
_MINUTES = flags.DEFINE_float("minutes", 15.0, "Give up after this time.", lower_bound=0.0)
_EPOCHS = flags.DEFINE_integer("epochs_each", 6, "Epochs of a training.", lower_bound=1)
_WHOSE = flags.DEFINE_enum("whose", "durable", ["durable", "keras"], "Whose callbacks write.")

_ROW = "{:>4}  {:>7}  {:>8}  {:<28}  {:>6}  {}"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    seed = _SEED.value if _SEED.value is not None else int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}, {_KILLS.value} kills, callbacks: {_WHOSE.value}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return _attack(pathlib.Path(folder), seed)


def _attack(folder: pathlib.Path, seed: int) -> int:
    end = time.monotonic() + 60.0 * _MINUTES.value
    trainings = Trainings(
        folder,
        epochs=_EPOCHS.value,
        callbacks=_WHOSE.value,
        random=np.random.default_rng(seed),
    )
    problems = trainings.train_whole()
    kills: list[Kill] = []
    count = 0
    print(_ROW.format("kill", "seconds", "training", "while it was", "backup", "found"))
    while len(kills) < _KILLS.value and time.monotonic() < end:
        count += 1
        done, at_the_end = trainings.train_interrupted(_KILLS.value - len(kills))
        for kill in done:
            kills.append(kill)
            problems += kill.problems
            print(_line(len(kills), count, kill), flush=True)
        verdict = "; ".join(at_the_end) or "equal to the whole training, bit for bit"
        print(f"training {count} ended: {verdict}", flush=True)
        problems += at_the_end
    if len(kills) < _KILLS.value:
        problems.append(f"only {len(kills)} kills in {_MINUTES.value:g} minutes")
    print(f"seed {seed}: {len(kills)} kills, {count} trainings, {len(problems)} violations")
    return 1 if problems else 0


def _line(number: int, count: int, kill: Kill) -> str:
    found = "; ".join(kill.problems) or "whole"
    seconds = f"{kill.ending.seconds:.2f}"
    return _ROW.format(number, seconds, count, kill.ending.phase, kill.backed_up, found)


if __name__ == "__main__":
    app.run(main)
