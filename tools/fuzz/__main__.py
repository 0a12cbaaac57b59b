"""Gives changed files and flags to the readers and tools of this project.

    python -m tools.fuzz --minutes=10 --seed=0
    python -m tools.fuzz --target=model_files --start=123 --cases=1   # one case again

Targets are certificates in JSON, model files, and the flags of the two tools; each runs for
--minutes. A fault is an error that is not documented, a traceback, a crash or a case without an
end, and for a model file any code of the file that ran. Each target runs in a process of its own,
which is started again after a crash. A fault is printed with the number of its case.

Exit codes: 0 without a fault, 1 with one.
"""

import ast
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import numpy as np
from absl import app, flags

from tools.fuzz.targets import TARGETS

_MINUTES = flags.DEFINE_float("minutes", 10.0, "Minutes for each target.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the cases.", lower_bound=0)
_TARGET = flags.DEFINE_multi_enum("target", list(TARGETS), list(TARGETS), "What to fuzz.")
_START = flags.DEFINE_integer("start", 0, "Number of the first case.", lower_bound=0)
_CASES = flags.DEFINE_integer("cases", None, "Most cases; by default as many as fit in the time.")

_ROOT = pathlib.Path(__file__).parents[2]
# Every case takes at most this long; the start of TensorFlow and an export are in it.
_SECONDS = 300.0
_PROGRAM = (
    "import sys; from tools.fuzz.__main__ import work; work(sys.argv[1], *map(int, sys.argv[2:]))"
)


def work(target: str, seed: int, start: int) -> None:
    """Run cases one after another, each announced before it runs. Stops when it is told to."""
    attack = TARGETS[target]()
    number = start
    # The real standard output: cases may redirect it.
    output = os.fdopen(os.dup(1), "w")
    for _ in sys.stdin:
        try:
            fault = attack(np.random.default_rng([seed, number]))
        except Exception:
            fault = traceback.format_exc()
        print(f"{number} {fault!r}", file=output, flush=True)
        number += 1


def fuzz(target: str, seed: int, start: int, cases: int | None, end: float) -> tuple[int, int]:
    """Run a target until the time is up; the numbers of cases and faults."""
    number, faults = start, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        worker = None
        while (cases is None or number < start + cases) and (
            number == start or time.monotonic() < end
        ):
            worker = worker or _Worker(target, seed, number, folder)
            fault = worker.next_case()
            if fault is None:
                fault = worker.close()
                worker = None
            if fault:
                faults += 1
                print(f"{target}, case {number}: {fault}", flush=True)
            number += 1
        if worker is not None:
            worker.close()
    return number - start, faults


class _Worker:
    """A process that runs cases."""

    def __init__(self, target: str, seed: int, number: int, folder: str):
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, target, str(seed), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env=environment,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def next_case(self) -> str | None:
        """The fault of the next case, an empty string, or `None` if the process ended."""
        assert self._process.stdin is not None
        try:
            print("next", file=self._process.stdin, flush=True)
            line = self._lines.get(timeout=_SECONDS)
        except (OSError, queue.Empty):
            return None
        return None if not line else ast.literal_eval(line.split(" ", 1)[1])

    def close(self) -> str:
        """End the process; what it ended with if it crashed or hung."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            code = self._process.wait(timeout=10.0)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        text = self._errors.read()[-2000:]
        self._errors.close()
        return f"the process ended with exit code {code} and {text!r}" if code else "no answer"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    total = 0
    for target in dict.fromkeys(_TARGET.value):
        end = time.monotonic() + 60.0 * _MINUTES.value
        count, faults = fuzz(target, _SEED.value, _START.value, _CASES.value, end)
        print(f"seed {_SEED.value}: {target}: {count} cases, {faults} faults", flush=True)
        total += faults
    return int(total > 0)


if __name__ == "__main__":
    app.run(main)
