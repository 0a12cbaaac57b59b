"""Changed model files and flags: one message and an exit code, and no code of the file runs."""

import io
import pathlib
import zipfile

import keras
import numpy as np
import pytest

from tools.fuzz import mutations, targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def attack(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield targets.model_files()


@pytest.mark.parametrize("number", range(40))
def test_a_changed_model_file_is_a_certificate_or_a_message(attack, number):
    assert attack(np.random.default_rng([0, number])) == ""


@pytest.mark.parametrize("name", ["config.json", "metadata.json", "model.weights.h5"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null"])
def test_a_model_file_with_a_broken_member_is_a_message(attack, folder, name, content):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.save(folder / "whole.keras")
    with zipfile.ZipFile(folder / "whole.keras") as opened:
        members = {entry: opened.read(entry) for entry in opened.namelist()}
    del members[name]
    if content is not None:
        members[name] = content
    path = folder / "broken.keras"
    path.write_bytes(mutations.archive(members))
    assert targets.run_tool("certify", [str(path)]) == ""


def test_the_fuzzer_sees_code_that_runs(attack, folder):
    # The file has a function in it, which an unsafe load would call.
    pathlib.Path(targets.MARKER).touch()
    assert "code ran" in targets.run_tool("certify", ["missing.keras"])


def test_changed_archives_differ_and_stay_archives(folder):
    first = mutations.archive({"a": b"1", "b": b"2", "c": b"3"})
    second = mutations.archive({"a": b"4", "d": b"5"})
    contents = set()
    for seed in range(50):
        changed = mutations.changed_archive(first, [second], np.random.default_rng(seed))
        with zipfile.ZipFile(io.BytesIO(changed)) as opened:
            contents.add(tuple((name, opened.read(name)) for name in opened.namelist()))
    assert len(contents) > 10
