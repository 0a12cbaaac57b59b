"""Timing of candidates side by side."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median of a sample with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample):
        low, median, high = np.percentile(np.asarray(sample, float), (25, 50, 75))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each candidate, one entry a round.

    Attributes:
        wall: Time on the clock on the wall.
        processor: Time of all threads of this process: on a machine with other work to do it says
            more about the candidates than the clock.
    """

    wall: dict[str, np.ndarray]
    processor: dict[str, np.ndarray]

    def ratio(self, slow, fast):
        """`Spread` of how many times longer `slow` took than `fast` in the same round."""
        return Spread.of(self.wall[slow] / self.wall[fast])

    def processor_ratio(self, slow, fast):
        """The same in processor time, the median alone."""
        return float(np.median(self.processor[slow] / self.processor[fast]))

    def milliseconds(self, name):
        return float(np.median(self.wall[name])) * 1e3


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 3,
    seconds: float = 0.05,
    wall: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
) -> Rounds:
    """Times candidates in turn, in one process, so that what slows the machine slows all of them.

    Every second round goes through them in reverse: none always runs on what another left in the
    caches. Ratios are taken within a round, their median over rounds.

    Args:
        candidates: Functions without arguments, by name, each of which returns when its work is
            done.
        rounds: Number of rounds.
        warm_up: Calls of each before anything is timed.
        seconds: A candidate is called again within a round until about this much time is measured.
        wall: Clock in seconds.
        processor: Clock of the processor time of this process, in seconds.

    Returns:
        `Rounds`.

    Raises:
        ValueError: If `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be positive. Received: rounds={rounds}")
    repeats = {}
    for name, run in candidates.items():
        for _ in range(warm_up):
            run()
        start = wall()
        run()
        repeats[name] = max(1, math.ceil(seconds / max(wall() - start, 1e-9)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for index in range(rounds):
        for name in list(candidates)[:: 1 if index % 2 == 0 else -1]:
            start = wall(), processor()
            for _ in range(repeats[name]):
                candidates[name]()
            spent = wall() - start[0], processor() - start[1]
            times[name].append((spent[0] / repeats[name], spent[1] / repeats[name]))
    return Rounds(
        wall={name: np.array([t[0] for t in entries]) for name, entries in times.items()},
        # A clock too coarse to see a short call must not divide by zero.
        processor={
            name: np.maximum([t[1] for t in entries], 1e-9) for name, entries in times.items()
        },
    )
