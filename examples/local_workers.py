"""Runs a program as several workers on this machine, to test it before it runs on several."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class FinishedWorker:
    """Result of a worker.

    Attributes:
        returncode: Exit status, or minus the signal that ended the worker.
        output: Standard output and standard error.
        killed: Whether the worker did not end by itself.
    """

    returncode: int
    output: str
    killed: bool


def run_workers(
    command: Sequence[str],
    workers: int,
    *,
    timeout: float,
    grace: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[FinishedWorker]:
    """Runs a program as several workers on this machine, and waits for all of them.

    Each worker gets `TF_CONFIG`, with free ports of 127.0.0.1. At the end no worker is left
    running, and no process that a worker started, even if this function raises.

    Args:
        command: Program and arguments, the same for each worker.
        workers: Number of workers. The first one is the chief.
        timeout: Seconds until workers that still run are killed.
        grace: Seconds until the other workers are killed after one has failed. TensorFlow notifies
            them within half a minute.
        environment: Environment of the workers, by default that of this process.

    Returns:
        A list of `FinishedWorker`, in the order of the workers.

    Raises:
        ValueError: If `workers` is not a positive integer, or `timeout` or `grace` not positive.
        OSError: If the program cannot be started.

    Example:

    ```python
    for worker in run_workers([sys.executable, "train.py"], 2, timeout=600):
        print(worker.returncode, worker.output)
    ```
    """
    if not isinstance(workers, int) or min(workers, timeout, grace) <= 0:
        raise ValueError(
            "`workers` must be a positive integer, `timeout` and `grace` must be positive. "
            f"Received: workers={workers}, timeout={timeout}, grace={grace}"
        )
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
    started: list[_Worker] = []
    try:
        for index in range(workers):
            config = {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
            variables = {**(environment or os.environ), "TF_CONFIG": json.dumps(config)}
            started.append(_Worker(command, variables))
        _wait(started, timeout, grace)
    finally:
        finished = [worker.end() for worker in started]
    return finished


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        # All open at the same time, so that no two ports are equal.
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(workers: Sequence["_Worker"], timeout: float, grace: float) -> None:
    deadline = time.monotonic() + timeout
    failed = False
    while time.monotonic() < deadline:
        states = [worker.poll() for worker in workers]
        if None not in states:
            return
        if any(states) and not failed:
            failed = True
            deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.05)


class _Worker:
    """A process in its own group, so that the processes it starts end with it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # A file: a pipe would have to be read while the worker runs.
        self._output = tempfile.TemporaryFile("w+", errors="replace")
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError:
            self._output.close()
            raise

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> FinishedWorker:
        killed = self._process.poll() is None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            # The whole group has ended.
            pass
        returncode = self._process.wait()
        with self._output:
            self._output.seek(0)
            return FinishedWorker(returncode, self._output.read(), killed)
