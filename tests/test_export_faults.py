"""Exports that fail: a clear error, nothing half-made, and the old export untouched."""

import hashlib
import importlib.util
import os
import pathlib
import resource
import signal
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import export_cases as cases
from keras import layers

from keras_lipattn.export import ExportError, _clean_process, _staging, export_saved_model


@pytest.fixture(scope="module")
def model():
    """Large enough that its variables do not fit into 300 kB."""
    inputs = keras.Input((64,), name="x")
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(2048)(inputs)))


@pytest.fixture(scope="module", autouse=True)
def client():
    with cases.one_serving_process() as client:
        yield client


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    """A good export; tests work on copies."""
    folder = tmp_path_factory.mktemp("original") / "model"
    export_saved_model(model, folder, verbose=False)
    return folder


@pytest.fixture
def published(original, tmp_path):
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", original, folder], check=True)
    return folder


def content(folder):
    """Every file below a folder, hidden ones too, with a digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "  ", None, 3, b"bytes", "gs://bucket/model", "a\0b"])
def test_paths_that_are_no_local_folder(model, path):
    with pytest.raises(ValueError, match=r"`path` must be .* Received: path="):
        export_saved_model(model, path)


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True, None])
def test_versions_that_are_no_positive_integer(model, tmp_path, version):
    with pytest.raises(ValueError, match=r"`version` must be .* Received: version="):
        export_saved_model(model, tmp_path / "model", version=version)


def test_something_that_is_no_built_model(tmp_path):
    with pytest.raises(ValueError, match=r"must be a `keras.Model`. Received"):
        export_saved_model(layers.Dense(3), tmp_path / "model")
    with pytest.raises(ValueError, match="Received: built=False"):
        export_saved_model(keras.Sequential([layers.Dense(3)]), tmp_path / "model")


def test_a_subclassed_model_that_does_not_know_its_inputs(tmp_path, monkeypatch):
    # Keras remembers the shapes of the first call; a model with a build of its own may not.
    monkeypatch.setattr(cases.Subclassed, "get_build_config", lambda self: None)
    with pytest.raises(ValueError, match=r"needs an `example_batch`.* Received"):
        export_saved_model(cases.subclassed(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "batch", [np.ones((2, 5)), np.ones(64), np.ones((0, 64)), [np.ones((2, 64))] * 2]
)
def test_an_example_that_does_not_fit(model, tmp_path, batch):
    with pytest.raises(ValueError, match=r"`example_batch` must hold .* Received"):
        export_saved_model(model, tmp_path / "model", example_batch=batch)


def test_inputs_that_cannot_be_made_up(tmp_path):
    inputs = keras.Input((1,), dtype="string")
    strings = keras.Model(inputs, layers.StringLookup(vocabulary=["a"])(inputs))
    with pytest.raises(ValueError, match="Give an `example_batch`"):
        export_saved_model(strings, tmp_path / "model")


def test_another_backend_is_refused_with_the_way_round(model, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"model\.keras.*Received: Keras on the backend 'jax'"):
        export_saved_model(model, tmp_path / "model")


# Targets ----------------------------------------------------------------------------------------


def test_a_file_in_the_way(model, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(NotADirectoryError, match="Received"):
            export_saved_model(model, path, overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_existing_version_is_not_replaced_unasked(model, published):
    before = content(published)
    with pytest.raises(FileExistsError, match="overwrite"):
        export_saved_model(model, published)
    assert content(published) == before


def test_only_a_saved_model_is_ever_replaced(model, tmp_path):
    photos = tmp_path / "model" / "1"
    photos.mkdir(parents=True)
    (photos / "photo.jpg").write_text("precious")
    with pytest.raises(FileExistsError, match=r"saved_model\.pb"):
        export_saved_model(model, tmp_path / "model", overwrite=True)
    assert (photos / "photo.jpg").read_text() == "precious"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_the_whole_version_and_no_other(
    model, published, monkeypatch, exchange
):
    if not exchange:
        monkeypatch.setattr(_staging, "_exchange", lambda one, other: False)
    (published / "1" / "left.over").write_text("old")
    (published / "2").mkdir()
    export_saved_model(model, published, overwrite=True, verbose=False)
    assert sorted(os.listdir(published)) == ["1", "2"]
    assert not (published / "1" / "left.over").exists()
    assert (published / "1" / "saved_model.pb").is_file()


# Failures on the way ----------------------------------------------------------------------------


def full_disk(monkeypatch):
    """Every file ends at 300 kB, for all of the process and TensorFlow's C++ too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = tf.saved_model.save

    def limited(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            return save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(tf.saved_model, "save", limited)


def failing_flush(monkeypatch):
    def flush(folder):
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr(_staging, "_flush", flush)


def failing_rename(monkeypatch):
    def rename(one, other):
        raise OSError(28, "No space left on device", str(other))

    monkeypatch.setattr(_staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(_staging.os, "rename", rename)


def failing_second_rename(monkeypatch):
    calls, rename = [], os.rename

    def second(one, other):
        calls.append(one)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(other))
        rename(one, other)

    monkeypatch.setattr(_staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(_staging.os, "rename", second)


def failing_folder(monkeypatch):
    def mkdtemp(**kwargs):
        raise PermissionError(30, "Read-only file system", str(kwargs["dir"]))

    monkeypatch.setattr(_staging.tempfile, "mkdtemp", mkdtemp)


def other_numbers(monkeypatch):
    serve = _clean_process.serve

    def wrong(folder, requests):
        answers = serve(folder, requests)
        answers["serving_default"]["output_0"] += 1e-3
        return answers

    monkeypatch.setattr(_clean_process, "serve", wrong)


def other_radii(monkeypatch):
    serve = _clean_process.serve

    def wrong(folder, requests):
        answers = serve(folder, requests)
        answers["certified"]["radius"] *= 1.1
        return answers

    monkeypatch.setattr(_clean_process, "serve", wrong)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "fault",
    [full_disk, failing_flush, failing_rename, failing_folder, other_numbers, other_radii],
)
def test_a_failure_leaves_nothing_and_spoils_nothing(
    model, original, tmp_path, monkeypatch, fault, overwrite
):
    folder = tmp_path / "deep" / "model"
    if overwrite:
        folder.parent.mkdir()
        subprocess.run(["cp", "-r", original, folder], check=True)
    before = content(tmp_path)
    fault(monkeypatch)
    with pytest.raises(ExportError, match="Received"):
        export_saved_model(model, folder, overwrite=overwrite, verbose=False)
    assert content(tmp_path) == before
    assert folder.exists() == overwrite
    assert sorted(os.listdir(tmp_path)) == (["deep"] if overwrite else [])


def test_a_failed_second_rename_puts_the_old_export_back(model, published, monkeypatch):
    before = content(published)
    failing_second_rename(monkeypatch)
    with pytest.raises(ExportError, match="No space left"):
        export_saved_model(model, published, overwrite=True, verbose=False)
    assert content(published) == before


def test_an_interrupt_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_clean_process, "serve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(model, tmp_path / "model", verbose=False)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_takes_no_files_gives_a_clear_error(model):
    # Not even root may create anything in /proc.
    with pytest.raises(ExportError, match="could not be written"):
        export_saved_model(model, "/proc/model", verbose=False)


_KILLED = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("staging", sys.argv[1])
staging = importlib.util.module_from_spec(spec)
spec.loader.exec_module(staging)
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
moment, target = sys.argv[2], pathlib.Path(sys.argv[3])
if moment == "renaming":
    staging._publish = die
if moment == "renamed":
    staging._flush_one = lambda path: die() if path == target.parent else None
with staging.staged(target, overwrite=True) as folder:
    folder.mkdir()
    (folder / "saved_model.pb").write_text("new")
    if moment == "writing":
        die()
"""


@pytest.mark.parametrize("moment", ["writing", "renaming", "renamed"])
def test_a_killed_export_leaves_a_whole_one(published, moment):
    before = content(published / "1")
    run = subprocess.run(
        [sys.executable, "-c", _KILLED, _staging.__file__, moment, published / "1"], check=False
    )
    assert run.returncode == -signal.SIGKILL
    after = content(published / "1")
    new = {"saved_model.pb": hashlib.sha256(b"new").hexdigest()}
    assert after == (new if moment == "renamed" else before)
    (shelter,) = [path for path in published.iterdir() if path.name != "1"]
    assert shelter.name.startswith(".export-")
    # The next export clears away what the killed one left, but nothing that is in use.
    with _staging.staged(published / "2", overwrite=False) as folder:
        assert not shelter.exists()
        folder.mkdir()
        with _staging.staged(published / "3", overwrite=False) as other:
            assert folder.exists()
            other.mkdir()
    assert sorted(os.listdir(published)) == ["1", "2", "3"]


def test_two_exports_to_one_target_do_not_mix(tmp_path):
    target = tmp_path / "model" / "1"
    with pytest.raises(OSError), _staging.staged(target, overwrite=False) as late:
        with _staging.staged(target, overwrite=False) as early:
            early.mkdir()
            (early / "file").write_text("early")
        late.mkdir()
        (late / "file").write_text("late")
    assert content(tmp_path) == {"model/1/file": hashlib.sha256(b"early").hexdigest()}


def test_a_model_that_cannot_be_served_is_reported(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"no model")
    spec: Any = importlib.util.spec_from_file_location("fresh", _clean_process.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(ExportError, match=r"cannot be served[\s\S]*exit code 1"):
        fresh.serve(tmp_path, {"serving_default": {"x": np.ones((1, 2))}})
