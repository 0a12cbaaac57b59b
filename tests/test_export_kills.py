"""Killed and simultaneous exports: every version is complete, and left-overs are removed."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_lipattn import _temporary_names
from keras_lipattn.export import version_folder

FILES = {"certificate.json", "saved_model.pb", "variables/a", "variables/b"}
_LOAD = """
import importlib.util, os, pathlib, signal, sys, types
# The package without its __init__, which would import TensorFlow.
sys.modules["keras_lipattn"] = types.ModuleType("keras_lipattn")
sys.modules["keras_lipattn"].__path__ = [str(pathlib.Path(sys.argv[1]).parents[1])]
spec = importlib.util.spec_from_file_location("version_folder", sys.argv[1])
version_folder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(version_folder)
directory = pathlib.Path(sys.argv[2])

def export(number):
    with version_folder.staging_folder(directory) as folder:
        (folder / "variables").mkdir(parents=True)
        for name in ("saved_model.pb", "variables/a", "variables/b", "certificate.json"):
            (folder / name).write_text(str(number) * 5000)
        return version_folder.publish(folder, directory)
"""


def start(program, directory, *arguments):
    """A process without TensorFlow that runs a program with the function `export`."""
    return subprocess.Popen(
        # -S: start without site-packages, which is faster.
        [sys.executable, "-S", "-c", _LOAD + program, version_folder.__file__, directory]
        + [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def hidden(directory):
    return [path for path in directory.iterdir() if not path.name.isdecimal()]


def versions(directory):
    """Maps each version to the number in its files, after a check that it is complete."""
    found = {}
    for version in directory.iterdir():
        if version.name.isdecimal():
            texts = {
                str(path.relative_to(version)): path.read_text()
                for path in version.rglob("*")
                if path.is_file()
            }
            assert set(texts) == FILES
            (text,) = set(texts.values())
            number = text[: len(text) // 5000]
            assert text == number * 5000
            found[int(version.name)] = int(number)
    return found


def empty_export(directory):
    with version_folder.staging_folder(directory) as folder:
        folder.mkdir()
        return version_folder.publish(folder, directory)


# Kills ------------------------------------------------------------------------------------------

_ENDLESS = """
number = 0
print("ready", flush=True)
while True:
    number += 1
    export(number)
"""


def test_every_version_is_complete_after_a_kill_at_any_moment(tmp_path):
    random = np.random.default_rng(20240229)
    directory = tmp_path / "model"
    count = 0
    for _ in range(20):
        with start(_ENDLESS, directory) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.05 * random.random())
            process.kill()
        assert process.returncode == -signal.SIGKILL
        if not directory.exists():
            continue
        found = versions(directory)
        assert sorted(found) == [*range(1, len(found) + 1)]
        assert len(found) >= count
        count = len(found)
        # Left by the last kill only.
        assert len(hidden(directory)) <= 1
    assert count > 0
    empty_export(directory)
    assert not hidden(directory)


_AT_A_MOMENT = """
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

moment = sys.argv[3]
if moment == "before the marker":
    version_folder.pathlib.Path.touch = die
if moment == "before the rename":
    version_folder._next_number = die
if moment == "after the rename":
    version_folder._flush = lambda path: die() if path == directory else None
if moment == "while writing":
    version_folder._flush_all = die
if moment == "while removing":
    def rmtree(folder, **options):
        os.remove(folder / "variables/a")
        die()

    version_folder.shutil.rmtree = rmtree
    with version_folder.staging_folder(directory) as folder:
        (folder / "variables").mkdir(parents=True)
        (folder / "variables/a").touch()
        (folder / "variables/b").touch()
        raise OSError("disk full")
export(2)
"""


@pytest.mark.parametrize(
    "moment",
    [
        "before the marker",
        "while writing",
        "before the rename",
        "after the rename",
        "while removing",
    ],
)
def test_the_next_export_removes_what_a_killed_one_left(tmp_path, moment):
    with start("export(1)", tmp_path) as process:
        pass
    assert process.returncode == 0
    with start(_AT_A_MOMENT, tmp_path, moment) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert versions(tmp_path) == {1: 1} | ({2: 2} if moment == "after the rename" else {})
    assert len(hidden(tmp_path)) == 1
    path = empty_export(tmp_path)
    assert path.name == ("3" if moment == "after the rename" else "2")
    assert not hidden(tmp_path)


# Two exports at once ----------------------------------------------------------------------------

_TWENTY = """
for _ in range(20):
    export(sys.argv[3])
"""


def test_simultaneous_exports_get_different_numbers(tmp_path):
    processes = [start(_TWENTY, tmp_path / "model", number) for number in (1, 2, 3)]
    for process in processes:
        with process:
            pass
        assert process.returncode == 0
    found = versions(tmp_path / "model")
    assert sorted(found) == [*range(1, 61)]
    assert [[*found.values()].count(number) for number in (1, 2, 3)] == [20, 20, 20]
    assert not hidden(tmp_path / "model")


def test_a_number_that_another_export_takes_first_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "1" / "variables").mkdir(parents=True)
    numbers = iter([1, 2])
    monkeypatch.setattr(version_folder, "_next_number", lambda directory: next(numbers))
    assert empty_export(tmp_path) == tmp_path / "2"
    assert (tmp_path / "1" / "variables").is_dir()


def test_the_folder_of_a_running_export_stays(tmp_path):
    with version_folder.staging_folder(tmp_path) as first:
        first.mkdir()
        with version_folder.staging_folder(tmp_path) as second:
            assert first.exists()
            second.mkdir()
            version_folder.publish(second, tmp_path)
        version_folder.publish(first, tmp_path)
    waits = """
with version_folder.staging_folder(directory) as folder:
    folder.mkdir()
    print("ready", flush=True)
    signal.pause()
"""
    with start(waits, tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        empty_export(tmp_path)
        (holder,) = hidden(tmp_path)
        assert (holder / "model").is_dir()
        process.kill()
    empty_export(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3", "4"]


# What is deleted --------------------------------------------------------------------------------


def dead_process():
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    return process.pid


def left_over(directory, host, pid, *, marker=True):
    holder = directory / f".keras_lipattn-export-{host}-{pid}-0123abcd"
    (holder / "model").mkdir(parents=True)
    (holder / "model" / "saved_model.pb").touch()
    if marker:
        (holder / version_folder._MARKER).touch()
    return holder


def test_the_folder_of_another_host_stays_for_a_day(tmp_path):
    holder = left_over(tmp_path, "elsewhere", dead_process())
    empty_export(tmp_path)
    assert (holder / "model" / "saved_model.pb").exists()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(holder, (two_days_ago, two_days_ago))
    empty_export(tmp_path)
    assert not holder.exists()


def test_a_day_ends_an_export_whose_process_id_is_in_use_again(tmp_path):
    holder = left_over(tmp_path, _temporary_names._host(), os.getpid())
    empty_export(tmp_path)
    assert holder.exists()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(holder, (two_days_ago, two_days_ago))
    empty_export(tmp_path)
    assert not holder.exists()


def test_no_folder_of_another_origin_is_deleted(tmp_path):
    pid = dead_process()
    holders = [
        left_over(tmp_path, _temporary_names._host(), pid, marker=False),
        left_over(tmp_path, _temporary_names._host(), "photos"),
    ]
    other = tmp_path / ".keras_lipattn-export-photos"
    other.mkdir()
    (other / "photo.jpg").write_text("precious")
    (tmp_path / ".tmp12345").mkdir()
    empty_export(tmp_path)
    assert all((holder / "model" / "saved_model.pb").exists() for holder in holders)
    assert (other / "photo.jpg").read_text() == "precious"
    assert (tmp_path / ".tmp12345").exists()


def test_a_file_that_no_export_wrote_stays_in_a_left_over(tmp_path):
    holder = left_over(tmp_path, _temporary_names._host(), dead_process())
    (holder / "photo.jpg").write_text("precious")
    empty_export(tmp_path)
    assert os.listdir(holder) == ["photo.jpg"]


def test_all_processes_of_a_host_give_it_the_same_name(tmp_path):
    with start(
        "from keras_lipattn import _temporary_names; print(_temporary_names._host())", tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read().strip() == _temporary_names._host()
    assert _temporary_names._host().startswith(socket.gethostname())
