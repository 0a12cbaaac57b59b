"""Checks of the files of a training. Each returns a list of problems."""

import csv
import io
import itertools
import json
import pathlib
import re
import zipfile

import h5py
import numpy as np

from tools.chaos.phase import read_journal


def broken_files(folder: pathlib.Path) -> list[str]:
    """Files that cannot be read to their end, except hidden files."""
    problems = []
    readers = {".h5": _read_h5, ".keras": _read_zip, ".npz": _read_zip, ".json": _read_json}
    for path in sorted(folder.rglob("*")):
        reader = readers.get(path.suffix)
        if reader is None or path.name.startswith("."):
            continue
        try:
            reader(path)
        except Exception as error:
            problems.append(f"{path.name} is broken: {type(error).__name__}: {error}")
    return problems


def epochs_backed_up(folder: pathlib.Path) -> int:
    """Number of epochs in the backup, in any of the formats."""
    metadata = folder / "backup" / "training_metadata.json"
    if metadata.exists():
        text = metadata.read_text()
        return json.loads(text)["epoch"] if text else 0
    numbers = [int(path.name[6:11]) for path in (folder / "backup").glob("epoch-*.npz")]
    state = folder / "backup" / "checkpoint"
    if state.exists():
        numbers += map(int, re.findall(r'^model_checkpoint_path: "epoch-(\d+)"', state.read_text()))
    numbers += [int(path.name) + 1 for path in (folder / "backup").glob("*") if path.name.isdigit()]
    return max(numbers, default=0)


def wrong_rows(folder: pathlib.Path, epochs: int) -> list[str]:
    """Problems of a history that must hold `epochs` epochs, or one more."""
    path = folder / "history.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = list(csv.reader(lines))
    problems = []
    if len({len(row) for row in rows}) > 1:
        problems.append("history.csv has a half-written row")
    numbers = [row[0] for row in rows[1:]]
    if numbers not in ([str(i) for i in range(n)] for n in (epochs, epochs + 1)):
        problems.append(f"history.csv must hold {epochs} epochs, but holds {numbers}")
    return problems


def lost_epochs(folder: pathlib.Path, epochs: int) -> list[str]:
    """Problems in the order in which `epochs` epochs were started."""
    journal = read_journal(folder)
    problems = []
    for (before, done), (process, begun) in itertools.pairwise(journal):
        # A run continues. The next run may start the last epoch again, but no earlier one.
        if begun != done + 1 and (process == before or begun != done):
            problems.append(f"epoch {begun + 1} was started after epoch {done + 1}")
    begun = sorted({epoch for _, epoch in journal})
    if begun != list(range(epochs)):
        problems.append(f"the epochs started are {begun}")
    return problems


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Results of two trainings that differ in any bit."""
    problems = []
    if (one / "history.csv").read_text() != (other / "history.csv").read_text():
        problems.append("history.csv differs from that of an uninterrupted training")
    with np.load(one / "final.npz") as first, np.load(other / "final.npz") as second:
        if first.files != second.files:
            return [*problems, "the variables have other names"]
        for name in first.files:
            if first[name].tobytes() != second[name].tobytes():
                problems.append(f"{name} differs from that of an uninterrupted training")
    return problems


def _read_h5(path: pathlib.Path) -> None:
    with h5py.File(path, "r") as file:
        # Through a function, since visiting ends at the first value that is not None.
        file.visititems(lambda name, item: _read_dataset(item))


def _read_dataset(item: h5py.HLObject) -> None:
    if isinstance(item, h5py.Dataset):
        item[()]


def _read_zip(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        for name in archive.namelist():
            if name.endswith(".h5"):
                with h5py.File(io.BytesIO(archive.read(name)), "r") as file:
                    file.visititems(lambda name, item: _read_dataset(item))


def _read_json(path: pathlib.Path) -> None:
    json.loads(path.read_text())
