"""Runs of `strategy_record.py` in processes of their own, one for each worker."""

import os
import pathlib
import sys

import numpy as np

from local_workers import run_workers

TESTS = pathlib.Path(__file__).parent.parent
PROGRAM = TESTS / "helpers" / "strategy_record.py"

# Name in the table of docs/distribution.md: strategy of the program, processes, replicas.
STRATEGIES = {
    "mirrored-2": ("mirrored-2", 1, 2),
    "mirrored-4": ("mirrored-4", 1, 4),
    "workers-2": ("workers", 2, 2),
    "workers-4": ("workers", 4, 4),
}
# A run takes half a minute on an idle machine. A worker that waits forever must be an error, and a
# busy machine with one core must not be one.
TIMEOUT = 1800.0


def run(program, *arguments, workers=1, timeout=TIMEOUT):
    """A list of `FinishedWorker`, one for each worker."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return run_workers(
        [sys.executable, str(program), *map(str, arguments)],
        workers,
        timeout=timeout,
        environment={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            # With one thread, a worker that waits for the others could not answer them.
            "TF_NUM_INTEROP_THREADS": "2",
        },
    )


def records(name, folder, mode="whole"):
    """The arrays of all processes of a run under a strategy, those of the chief first."""
    strategy, workers, _ = STRATEGIES.get(name, (name, 1, 1))
    for finished in run(PROGRAM, strategy, folder, mode, workers=workers):
        assert finished.returncode == 0, finished.output
    arrays = []
    for index in range(workers):
        with np.load(folder / f"record-{index}.npz") as record:
            arrays.append(dict(record))
    return arrays
