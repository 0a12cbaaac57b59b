"""Workers get a cluster of free ports, end in time, and leave no process behind."""

import json
import os
import pathlib
import sys
import time

import pytest

from local_workers import run_workers


def _run(program, workers=2, timeout=600.0, **kwargs):
    return run_workers([sys.executable, "-c", program], workers, timeout=timeout, **kwargs)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie counts as alive for the system.
    return pathlib.Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def test_each_worker_knows_its_place_in_the_cluster():
    finished = _run("import os; print(os.environ['TF_CONFIG'])", workers=3)
    configs = [json.loads(worker.output) for worker in finished]
    assert [config["task"]["index"] for config in configs] == [0, 1, 2]
    (addresses,) = {tuple(config["cluster"]["worker"]) for config in configs}
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert all(worker.returncode == 0 and not worker.killed for worker in finished)


def test_the_environment_is_the_one_given():
    (worker,) = _run("import os; print(os.environ['A'])", 1, environment={"A": "b"})
    assert worker.output == "b\n"


def test_both_streams_and_the_exit_status_are_returned():
    program = "import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr); exit(7)"
    for worker in _run(program):
        assert (worker.returncode, worker.output) == (7, "out\nerr\n")


def test_workers_that_do_not_end_are_killed_with_what_they_started():
    program = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)\n"
        "sys.stdout.flush(); time.sleep(600)"
    )
    # Time to start four processes, on a busy machine too.
    finished = _run(program, timeout=5.0 * max(1.0, os.getloadavg()[0]))
    assert all(worker.killed and worker.returncode == -9 for worker in finished)
    # The system takes a moment to remove them.
    for pid in [int(worker.output) for worker in finished]:
        deadline = time.monotonic() + 600.0
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(pid)


def test_the_others_are_killed_a_while_after_one_failed():
    program = (
        "import json, os, sys, time\n"
        "if json.loads(os.environ['TF_CONFIG'])['task']['index'] == 1: sys.exit(5)\n"
        "time.sleep(600)"
    )
    first, second = _run(program, grace=0.2)
    assert first.killed
    assert (second.returncode, second.killed) == (5, False)


def test_nothing_is_left_when_a_worker_cannot_be_started():
    with pytest.raises(FileNotFoundError):
        run_workers(["/no/such/program"], 2, timeout=5.0)


@pytest.mark.parametrize(("workers", "timeout"), [(0, 1.0), (1.5, 1.0), (2, 0.0)])
def test_bad_arguments_are_refused(workers, timeout):
    with pytest.raises(ValueError, match="Received"):
        _run("", workers, timeout)
