"""Trainings that are killed and run again end like an uninterrupted one."""

import types

import numpy as np
import pytest

from tools.chaos import attack, exports, inspection
from tools.chaos.phase import Phase
from tools.chaos.trainings import Kill, Trainings


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a whole training and others killed twice in all, and what was found."""
    folder = tmp_path_factory.mktemp("trainings")
    trainings = Trainings(
        folder, epochs=3, callbacks="durable", random=np.random.default_rng(20240229)
    )
    whole = trainings.train_whole()
    kills, problems = [], []
    # A training may end before it is killed; then another one is started.
    for _ in range(10):
        done, at_the_end = trainings.train_interrupted(2 - len(kills))
        kills += done
        problems += at_the_end
        if len(kills) == 2:
            break
    return folder, whole, kills, problems


def test_a_training_killed_at_random_moments_ends_as_a_whole_one(killed):
    _, whole, kills, problems = killed
    assert not whole
    assert len(kills) == 2
    assert not [kill.problems for kill in kills if kill.problems]
    assert not problems


def test_what_is_broken_lost_or_different_is_found(killed, tmp_path):
    folder = killed[0] / "whole"
    assert not inspection.broken_files(folder)
    (model,) = folder.glob("*.keras")
    (backup,) = (folder / "backup").iterdir()
    for path in (model, backup, folder / "final.npz"):
        half = tmp_path / path.name
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(inspection.broken_files(tmp_path)) == 3
    assert inspection.wrong_rows(folder, 4)
    history = (folder / "history.csv").read_text()
    for text in (history[:-20], history + history.splitlines()[-1] + "\n"):
        (tmp_path / "history.csv").write_text(text)
        assert inspection.wrong_rows(tmp_path, 3)
        assert inspection.differences(folder, folder) == []
    phase = Phase(tmp_path)
    for epoch in (0, 1, 3):
        phase.record(epoch)
    assert inspection.lost_epochs(tmp_path, 4)
    with np.load(folder / "final.npz") as arrays:
        changed = dict(arrays)
    name = next(name for name in changed if name.endswith("penalty_coefficient"))
    changed[name] = np.nextafter(changed[name], np.float32(1e9))
    np.savez(tmp_path / "final.npz", **changed)
    (tmp_path / "history.csv").write_text(history)
    (difference,) = inspection.differences(folder, tmp_path)
    assert difference.startswith(name)


@pytest.mark.parametrize("problem", [None, "a kill", "the end"])
def test_the_program_fails_when_anything_was_found(monkeypatch, capsys, tmp_path, problem):
    ending = types.SimpleNamespace(seconds=1.5, phase="writing backup of epoch 2")
    found = ["model.keras is broken"]
    kill = Kill(ending=ending, backed_up=1, problems=found if problem == "a kill" else [])  # pyright: ignore

    class Planted:
        def __init__(self, folder, **kwargs):
            pass

        def train_whole(self):
            return []

        def train_interrupted(self, kills):
            return [kill] * min(kills, 2), found if problem == "the end" else []

    monkeypatch.setattr(attack, "Trainings", Planted)
    code = attack.attack(tmp_path, kills=3, seed=7, minutes=1.0, epochs=3, whose="durable")
    assert code == (0 if problem is None else 1)
    printed = capsys.readouterr().out
    assert "seed 7: 3 kills, 2 trainings" in printed
    assert printed.count("writing backup of epoch 2") == 3
    assert ("is broken" in printed) == (problem is not None)


def test_exports_killed_beside_another_writer_leave_whole_versions_and_foreign_files(
    tmp_path, capsys
):
    assert exports.attack_exports(tmp_path, kills=1, seed=3, minutes=30.0) == 0
    assert "seed 3: 1 kills" in capsys.readouterr().out
    model = tmp_path / "model"
    assert exports.inspect(model) == []
    (model / "latest" / "saved_model.pb").unlink()
    (model / "1" / "variables" / "variables.index").write_bytes(b"")
    assert exports.inspect(model) == [
        "version 1 has no variables/variables.index",
        "latest/saved_model.pb changed",
    ]
