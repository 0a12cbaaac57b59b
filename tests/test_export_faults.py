"""Exports that fail: a clear error, no incomplete version, and old versions unchanged."""

import hashlib
import os
import pathlib
import resource
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import export_cases as cases
from keras import layers

from keras_lipattn.export import ExportError, export_saved_model, verification, version_folder

# Imported before `client` replaces it.
from keras_lipattn.export.verification import serve


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
    """An export; tests use copies of it."""
    folder = tmp_path_factory.mktemp("original") / "model"
    export_saved_model(model, folder, verbose=False)
    return folder


@pytest.fixture
def published(original, tmp_path):
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", original, folder], check=True)
    return folder


def content(folder):
    """Digests of all files in a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "  ", None, 3, b"bytes", "gs://bucket/model", "a\0b"])
def test_paths_that_are_no_local_folder(model, path):
    with pytest.raises(ValueError, match=r"`directory` must be .* Received: directory="):
        export_saved_model(model, path)


def test_something_that_is_no_built_model(tmp_path):
    with pytest.raises(ValueError, match=r"must be a `keras.Model`. Received"):
        export_saved_model(layers.Dense(3), tmp_path / "model")
    with pytest.raises(ValueError, match="Received: built=False"):
        export_saved_model(keras.Sequential([layers.Dense(3)]), tmp_path / "model")


def test_a_subclassed_model_that_does_not_know_its_inputs(tmp_path, monkeypatch):
    # Keras remembers the shapes of the first call, but a model with its own `build` may not.
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
    with pytest.raises(ValueError, match="An `example_batch` is needed"):
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
            export_saved_model(model, path)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_new_version_gets_the_next_number_and_changes_nothing_else(model, published):
    (published / "7").mkdir()
    (published / "7" / "photo.jpg").write_text("precious")
    (published / "latest").symlink_to("1")
    (published / "notes.txt").write_text("precious")
    before = content(published)
    _, path = export_saved_model(model, published, verbose=False)
    assert path == published / "8"
    assert (path / "saved_model.pb").is_file()
    assert sorted(os.listdir(published)) == ["1", "7", "8", "latest", "notes.txt"]
    after = content(published)
    assert {name: after[name] for name in before} == before


def test_a_file_with_a_number_for_a_name_takes_this_number(model, tmp_path):
    (tmp_path / "1").write_text("precious")
    assert export_saved_model(model, tmp_path, verbose=False).path == tmp_path / "2"
    assert (tmp_path / "1").read_text() == "precious"


def test_a_relative_directory_gives_an_absolute_path(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export_saved_model(model, "model", verbose=False).path == tmp_path / "model" / "1"


# Failures on the way ----------------------------------------------------------------------------


def full_disk(monkeypatch):
    """Limit files to 300 kB, also in the C++ code of TensorFlow."""
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

    monkeypatch.setattr(version_folder, "_flush_all", flush)


def failing_rename(monkeypatch):
    def rename(one, other):
        raise OSError(28, "No space left on device", str(other))

    monkeypatch.setattr(version_folder.os, "rename", rename)


def failing_folder(monkeypatch):
    mkdir = pathlib.Path.mkdir

    def read_only(path, *args, **kwargs):
        if path.name.startswith(".keras_lipattn-export"):
            raise PermissionError(30, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "mkdir", read_only)


def other_numbers(monkeypatch):
    serve = verification.serve

    def wrong(folder, requests):
        answers = serve(folder, requests)
        answers["serving_default"]["output_0"] += 1e-3
        return answers

    monkeypatch.setattr(verification, "serve", wrong)


def other_radii(monkeypatch):
    serve = verification.serve

    def wrong(folder, requests):
        answers = serve(folder, requests)
        answers["certified"]["radius"] *= 1.1
        return answers

    monkeypatch.setattr(verification, "serve", wrong)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "fault",
    [full_disk, failing_flush, failing_rename, failing_folder, other_numbers, other_radii],
)
def test_a_failure_leaves_nothing_and_spoils_nothing(
    model, original, tmp_path, monkeypatch, fault, exists
):
    folder = tmp_path / "deep" / "model"
    if exists:
        folder.parent.mkdir()
        subprocess.run(["cp", "-r", original, folder], check=True)
    before = content(tmp_path)
    fault(monkeypatch)
    with pytest.raises(ExportError, match="Received"):
        export_saved_model(model, folder, verbose=False)
    assert content(tmp_path) == before
    assert folder.exists() == exists
    assert sorted(os.listdir(tmp_path)) == (["deep"] if exists else [])


def test_a_version_is_published_although_its_parent_cannot_be_flushed(model, tmp_path, monkeypatch):
    flush = version_folder._flush

    def flush_files(path):
        if path == tmp_path:
            raise OSError(22, "Invalid argument", str(path))
        flush(path)

    monkeypatch.setattr(version_folder, "_flush", flush_files)
    assert export_saved_model(model, tmp_path, verbose=False).path == tmp_path / "1"
    assert os.listdir(tmp_path) == ["1"]


def test_an_interrupt_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "serve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(model, tmp_path / "model", verbose=False)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_takes_no_files_gives_a_clear_error(model):
    # Root cannot create files in /proc either.
    with pytest.raises(ExportError, match="could not be written"):
        export_saved_model(model, "/proc/model", verbose=False)


def test_a_model_that_cannot_be_served_is_reported(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot be served[\s\S]*exit code 1"):
        serve(tmp_path, {"serving_default": {"x": np.ones((1, 2))}})
