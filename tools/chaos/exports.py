"""Exports that are killed at random moments while a second one writes to the same folder."""

import itertools
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from keras_lipattn.export import export_saved_model
from tools.chaos.killing import Aim, Programs
from tools.chaos.phase import Phase
from tools.chaos.training import classifier

FILES = ("saved_model.pb", "variables/variables.index", "assets.extra/certificate.json")
# Files of other programs in the same folder: none may change.
FOREIGN = {
    "notes.txt": "notes",
    ".export-old/photo.jpg": "photo",
    ".keras_lipattn-export-photos/photo.jpg": "photo",
    "latest/saved_model.pb": "graph",
}


def run(folder: pathlib.Path, seed: int) -> None:
    """Export a model with random weights to `folder / "model"`."""
    phase = Phase(folder / f"writer-{seed % 2}")
    tempfile.tempdir = str(folder / "temporary")
    model: Any = classifier()
    random = np.random.default_rng(seed)
    model.set_weights([random.normal(size=weight.shape) for weight in model.weights])
    phase.tell("exporting")
    export_saved_model(model, folder / "model", verbose=False)
    phase.tell("ended")


def attack_exports(folder: pathlib.Path, *, kills: int, seed: int, minutes: float) -> int:
    """Kill exports and print a table.

    Args:
        folder: Folder of everything.
        kills: Number of kills.
        seed: Seed of the moments.
        minutes: Time after which no further export is started.

    Returns:
        Exit code: 1 after any problem, or if time is up before the last kill.
    """
    print(f"seed {seed}, {kills} kills of exports, two writers", flush=True)
    end = time.monotonic() + 60.0 * minutes
    random = np.random.default_rng(seed)
    programs = Programs("tools.chaos.exports")
    model = folder / "model"
    (folder / "temporary").mkdir()
    for name, text in FOREIGN.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    whole = programs.run(folder, run, 0)
    problems = [f"an export failed: {whole}"] * (whole.exit_code != 0) + inspect(model)
    fallen, published = 0, len(versions(model))
    aim = Aim(phase="", within=1.1 * whole.seconds, share=1.0)
    for number in itertools.count(1):
        if fallen == kills or time.monotonic() > end:
            break
        other = programs.start(folder, run, 2 * number)
        ending = programs.kill(folder, run, 2 * number + 1, aim=aim, random=random)
        other.join()
        found = inspect(model)
        if other.exitcode != 0:
            found.append(f"the export that was not killed failed with code {other.exitcode}")
        missing = published + 1 + (not ending.killed) - len(versions(model))
        # A killed export may have been published just before.
        if missing > 0:
            found.append(f"{missing} versions are missing")
        published = len(versions(model))
        fallen += ending.killed
        if ending.killed:
            what = "; ".join(found) or "whole"
            print(
                f"{fallen:>4}  {ending.seconds:>6.2f} s  {published:>4} versions  {what}",
                flush=True,
            )
        problems += found
    last = programs.run(folder, run, 1)
    problems += [f"the last export failed: {last}"] * (last.exit_code != 0) + inspect(model)
    left = [*model.glob(".keras_lipattn-*"), *(folder / "temporary").glob(".keras_lipattn-*")]
    foreign = {path.split("/")[0] for path in FOREIGN}
    problems += [f"{path.name} was left behind" for path in left if path.name not in foreign]
    if fallen < kills:
        problems.append(f"only {fallen} kills in {minutes:g} minutes")
    print(
        f"seed {seed}: {fallen} kills, {len(versions(model))} versions, {len(problems)} violations"
    )
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def versions(model: pathlib.Path) -> list[pathlib.Path]:
    """Paths of the published versions."""
    return [model / name for name in os.listdir(model) if name.isdecimal()]


def inspect(model: pathlib.Path) -> list[str]:
    """Versions that are not complete, and files of other programs that changed."""
    problems = [
        f"version {version.name} has no {name}"
        for version in versions(model)
        for name in FILES
        if not (version / name).is_file() or not (version / name).stat().st_size
    ]
    for name, text in FOREIGN.items():
        if not (model / name).is_file() or (model / name).read_text() != text:
            problems.append(f"{name} changed")
    return problems
