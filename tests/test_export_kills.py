"""Exports killed at random moments: the old one or the new one, and nothing left for long."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_lipattn.export import _staging

# Publishes folders whose files all hold one number, again and again.
_PROGRAM = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("staging", sys.argv[1])
staging = importlib.util.module_from_spec(spec)
spec.loader.exec_module(staging)
if sys.argv[3] == "renames":
    staging._exchange = lambda one, other: False
target, number = pathlib.Path(sys.argv[2]), int(sys.argv[4])
print("ready", flush=True)
while True:
    number += 1
    with staging.staged(target, overwrite=True) as folder:
        (folder / "variables").mkdir(parents=True)
        for name in ("saved_model.pb", "variables/a", "variables/b", "certificate.json"):
            (folder / name).write_text(str(number) * 5000)
"""
_FILES = ["certificate.json", "saved_model.pb", "variables/a", "variables/b"]


def numbers(folder):
    """The number in each file of an export."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            text = path.read_text()
            number = text[: len(text) // 5000]
            assert text == number * 5000
            found[str(path.relative_to(folder))] = int(number)
    return found


def killed(parent, how, number, delay):
    """Runs the program, kills it, and returns the numbers of what is published then."""
    program = subprocess.Popen(
        [sys.executable, "-S", "-c", _PROGRAM, _staging.__file__, parent / "1", how, str(number)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
        time.sleep(delay)
        program.kill()
    assert program.returncode == -signal.SIGKILL
    return numbers(parent / "1")


def test_what_is_published_is_one_whole_export_after_any_kill(tmp_path):
    random = np.random.default_rng(20240229)
    parent = tmp_path / "model"
    number = 10000
    for _ in range(20):
        found = killed(parent, "exchange", number, 0.05 * random.random())
        if not found and number == 10000:
            # Killed before the first was there.
            assert not (parent / "1").exists()
            continue
        assert list(found) == _FILES
        assert len(set(found.values())) == 1
        # Never an older one than that of the kill before.
        assert found["saved_model.pb"] >= number
        number = found["saved_model.pb"]
        # What earlier kills left was cleared away by the program itself.
        assert len([name for name in os.listdir(parent) if name != "1"]) <= 1
    assert number > 10000


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_the_next_export_clears_away_what_a_killed_one_left(tmp_path, how):
    for number in (10000, 20000, 30000):
        killed(tmp_path, how, number, 0.02)
    with _staging.staged(tmp_path / "2", overwrite=False) as folder:
        folder.mkdir()
    assert set(os.listdir(tmp_path)) <= {"1", "2"}


_BETWEEN = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("staging", sys.argv[1])
staging = importlib.util.module_from_spec(spec)
spec.loader.exec_module(staging)
staging._exchange = lambda one, other: False
target = pathlib.Path(sys.argv[2])
with staging.staged(target, overwrite=True) as folder:
    folder.mkdir()
    rename = os.rename
    def rename_once(one, other):
        rename(one, other)
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename_once
"""


def test_without_a_swap_a_kill_between_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "model" / "1"
    target.mkdir(parents=True)
    (target / "saved_model.pb").write_text("old")
    done = subprocess.run([sys.executable, "-S", "-c", _BETWEEN, _staging.__file__, target])
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    with _staging.staged(target.parent / "2", overwrite=False) as folder:
        assert (target / "saved_model.pb").read_text() == "old"
        folder.mkdir()
    assert sorted(os.listdir(target.parent)) == ["1", "2"]
