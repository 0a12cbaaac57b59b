"""Backup, history and checkpoint are replaced atomically, and training resumes bit for bit."""

import collections
import errno
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from helpers import monitor_models
from keras.src.callbacks import backup_and_restore

import keras_lipattn as kl
from keras_lipattn import _temporary_names, _whole_file
from keras_lipattn._whole_file import whole_file


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Whole files ------------------------------------------------------------------------------------


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    target = tmp_path / "file.txt"
    for text in ("one", "two"):
        with whole_file(target) as path:
            assert path.suffix == ".txt"
            path.write_text(text)
            assert not target.exists() or target.read_text() != text
        assert target.read_text() == text
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), whole_file(target) as path:
        path.write_text("new")
        raise error("at the end")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_says_that_the_file_is_as_it_was_and_keeps_its_kind(tmp_path):
    with pytest.raises(PermissionError, match=r"as it was\. Received: .*denied"):
        with whole_file(tmp_path / "file"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_links_stay_links(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with whole_file(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_devices_are_written_to_and_never_replaced():
    with whole_file("/dev/null") as path:
        path.write_text("gone")
    assert pathlib.Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"), whole_file("/dev/full") as path:
        path.write_text("too much")
    assert pathlib.Path("/dev/full").is_char_device()


def test_remote_paths_are_refused():
    with pytest.raises(ValueError, match=r"local.*Received: path='gs://"):
        whole_file("gs://bucket/file").__enter__()


WRITER = """
import sys, types
package, letter, path = sys.argv[1:]
# The package without its __init__, which would import TensorFlow.
sys.modules["keras_lipattn"] = types.ModuleType("keras_lipattn")
sys.modules["keras_lipattn"].__path__ = [package]
from keras_lipattn._whole_file import whole_file
print("ready", flush=True)
while True:
    with whole_file(path) as partial, open(partial, "w") as file:
        for _ in range(50):
            file.write(letter * 2000)
            file.flush()
"""


def test_readers_never_see_a_torn_file_of_two_writers(tmp_path):
    target = tmp_path / "file.txt"
    command = [sys.executable, "-c", WRITER, os.path.dirname(kl.__file__)]
    writers = [
        subprocess.Popen([*command, letter, target], stdout=subprocess.PIPE) for letter in "ab"
    ]
    seen = collections.Counter()
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        while min(seen["a"], seen["b"]) < 50:
            if target.exists():
                text = target.read_text()
                assert text in ("a" * 100_000, "b" * 100_000)
                seen[text[0]] += 1
            assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    # What the killed writers left is removed by the next one, and nothing else.
    (tmp_path / ".keras_lipattn-partial-photo.jpg").write_text("precious")
    left_by_killed_process(tmp_path, host="elsewhere").write_text("half")
    with whole_file(tmp_path / "other.txt") as path:
        path.write_text("new")
    hidden = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert len(hidden) == 2 and all("photo" in name or "elsewhere" in name for name in hidden)


def left_by_killed_process(folder, host=None):
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    host = host or _temporary_names._host()
    return folder / f".keras_lipattn-partial-{host}-{process.pid}-0123abcd.npz"


def test_temporary_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(_temporary_names.tempfile, "gettempdir", lambda: str(tmp_path))
    left = left_by_killed_process(tmp_path)
    left.mkdir()
    (left / "requests.npz").touch()
    (tmp_path / "other").mkdir()
    with _temporary_names.temporary_folder("partial") as folder:
        (folder / "file").touch()
        assert sorted(os.listdir(tmp_path)) == [folder.name, "other"]
        with _temporary_names.temporary_folder("partial"):
            assert folder.exists()
    assert os.listdir(tmp_path) == ["other"]


# Backup -----------------------------------------------------------------------------------------


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise RuntimeError("stopped")


def model_with_dropout(policy="float32", *, run_eagerly=True) -> Any:
    # Eager by default: there are few steps, and tracing takes most of the time.
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((monitor_models.TOKENS, monitor_models.FEATURES))
        x = monitor_models.dense(spectral_norm=1.0)(inputs)
        x = keras.layers.Dropout(0.3)(keras.layers.GlobalAveragePooling1D()(x))
        model: Any = keras.Model(inputs, monitor_models.dense(3, name="head")(x))
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            run_eagerly=run_eagerly,
            jit_compile=False,
        )
    finally:
        keras.config.set_dtype_policy("float32")
    return model


def fit(model, folder, *callbacks, epochs=4):
    return monitor_models.fit(
        model,
        kl.LipschitzMonitor(
            penalty=lambda epoch, coefficient: 1.5 * coefficient + 0.1, target=0.2, running_freq=1
        ),
        kl.DurableCSVLogger(folder / "history.csv"),
        kl.DurableBackup(folder / "backup"),
        *callbacks,
        epochs=epochs,
    )


def everything(model):
    return [(v.path, np.array(v)) for v in (*model.variables, *model.optimizer.variables)]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, policy):
    def build():
        return model_with_dropout(policy, run_eagerly=False)

    whole = build()
    fit(whole, tmp_path / "whole")
    folder = tmp_path / "stopped"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(build(), folder, Stop())
    resumed = build()
    history = fit(resumed, folder)
    assert len(history["loss"]) == 2
    before, after = everything(whole), everything(resumed)
    for (path, value), (_, restored) in zip(before, after, strict=True):
        np.testing.assert_array_equal(restored, value, err_msg=path)
    assert {"seed_generator_state", "penalty_coefficient", "kernel_vector"} <= {
        path.split("/")[-1] for path, _ in before
    }
    assert (folder / "history.csv").read_text() == (tmp_path / "whole/history.csv").read_text()


def test_a_finished_training_trains_no_more_and_has_its_weights(tmp_path):
    model = model_with_dropout()
    fit(model, tmp_path, epochs=2)
    again = model_with_dropout()
    assert fit(again, tmp_path, epochs=2) == {}
    np.testing.assert_array_equal(monitor_models.weights(again), monitor_models.weights(model))


def test_the_folder_can_be_removed_at_the_end(tmp_path):
    backup = kl.DurableBackup(tmp_path / "backup", delete_checkpoint=True)
    monitor_models.fit(model_with_dropout(), backup, epochs=2)
    assert not os.listdir(tmp_path)


def test_a_later_fit_of_the_model_begins_at_its_beginning(tmp_path):
    fit(model_with_dropout(), tmp_path, epochs=2)
    model = model_with_dropout()
    # An exception, which does not notify callbacks.
    with pytest.raises(ZeroDivisionError):
        fit(model, tmp_path, keras.callbacks.LambdaCallback(lambda *_: 1 / 0), epochs=3)
    assert len(monitor_models.fit(model, epochs=2)["loss"]) == 2
    # All epochs are complete: none begins.
    fit(model, tmp_path, epochs=2)
    assert len(monitor_models.fit(model, epochs=2)["loss"]) == 2


def test_only_the_newest_backup_is_kept_and_partial_files_are_removed(tmp_path):
    (tmp_path / "backup").mkdir()
    left_by_killed_process(tmp_path / "backup").write_text("half")
    fit(model_with_dropout(), tmp_path, epochs=3)
    assert os.listdir(tmp_path / "backup") == ["epoch-00003.npz"]
    assert kl.DurableBackup(tmp_path / "backup").completed == 3


def test_the_newer_of_two_backups_is_restored(tmp_path):
    # As left by a program killed between writing one and removing the other.
    with pytest.raises(RuntimeError, match="stopped"):
        fit(model_with_dropout(), tmp_path, Stop())
    (tmp_path / "backup" / "epoch-00001.npz").write_text("older")
    assert len(fit(model_with_dropout(), tmp_path)["loss"]) == 2


def test_a_full_disk_keeps_the_old_files_and_training_continues(tmp_path, monkeypatch):
    model = model_with_dropout()

    class Fill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                monkeypatch.setattr(_whole_file.os, "replace", full_disk)

    with pytest.warns(UserWarning, match="Training continues.*No space left") as caught:
        history = fit(model, tmp_path, Fill(), epochs=3)
    assert len(history["loss"]) == 3
    messages = [str(warning.message) for warning in caught]
    for what in ("The history of epoch 2 could not be written", "Epoch 3 could not be backed up"):
        assert sum(f"{what}. Training continues" in message for message in messages) == 1
    assert os.listdir(tmp_path / "backup") == ["epoch-00001.npz"]
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0"]


def test_a_history_that_could_not_be_written_is_written_with_the_next_epoch(tmp_path, monkeypatch):
    replace = os.replace

    class Fill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            monkeypatch.setattr(_whole_file.os, "replace", full_disk if epoch == 1 else replace)

    with pytest.warns(UserWarning, match="Training continues"):
        fit(model_with_dropout(), tmp_path, Fill(), epochs=3)
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2"]
    assert os.listdir(tmp_path / "backup") == ["epoch-00003.npz"]


def test_a_backup_of_another_model_is_refused(tmp_path):
    fit(model_with_dropout(), tmp_path, epochs=1)
    before = (tmp_path / "backup" / "epoch-00001.npz").read_bytes()
    other = monitor_models.compiled(monitor_models.sequential())
    with pytest.raises(ValueError, match=r"differs from the one in the backup.*Received"):
        fit(other, tmp_path, epochs=2)
    assert (tmp_path / "backup" / "epoch-00001.npz").read_bytes() == before


def test_a_model_of_bfloat16_weights_is_restored(tmp_path):
    def build():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
        return monitor_models.compiled(model, loss="mse", run_eagerly=True)

    x, y = np.ones((4, 3)), np.ones((4, 2))
    model = build()
    model.fit(x, y, epochs=1, verbose=0, callbacks=[kl.DurableBackup(tmp_path)])
    again = build()
    again.fit(x, y, epochs=1, verbose=0, callbacks=[kl.DurableBackup(tmp_path)])
    for one, other in zip(model.variables, again.variables, strict=True):
        np.testing.assert_array_equal(np.float32(one.numpy()), np.float32(other.numpy()))


def test_a_model_without_weights_is_refused(tmp_path):
    model = monitor_models.compiled(monitor_models.subclassed())
    with pytest.raises(ValueError, match=r"Build the model.*Received"):
        monitor_models.fit(model, kl.DurableBackup(tmp_path))
    with pytest.raises(ValueError, match="must name a folder"):
        kl.DurableBackup("")


def test_keras_own_backup_still_has_windows(tmp_path, monkeypatch):
    # When this fails, Keras writes its backup atomically and `DurableBackup` is not needed.
    class Broken:
        @staticmethod
        def dumps(content):
            if content["epoch"] == 2:
                raise KeyboardInterrupt
            return json.dumps(content)

    monkeypatch.setattr(backup_and_restore, "json", Broken)
    with pytest.raises(KeyboardInterrupt):
        model = monitor_models.compiled(monitor_models.sequential())
        monitor_models.fit(model, keras.callbacks.BackupAndRestore(tmp_path), epochs=3)
    assert (tmp_path / "training_metadata.json").read_text() == ""
    assert (tmp_path / "latest.weights.h5").stat().st_size > 0


# History ----------------------------------------------------------------------------------------


def test_an_epoch_trained_again_replaces_its_row(tmp_path):
    path = tmp_path / "history.csv"
    for epochs in (range(4), range(2, 5)):
        logger = kl.DurableCSVLogger(path)
        logger.on_train_begin()
        for epoch in epochs:
            logger.on_epoch_end(epoch, {"loss": 10.0 * epochs.start + epoch, "size": np.ones(2)})
    assert path.read_text().splitlines() == [
        "epoch,loss,size",
        *(
            f'{epoch},{loss},"[1.0, 1.0]"'
            for epoch, loss in enumerate([0.0, 1.0, 22.0, 23.0, 24.0])
        ),
    ]


def test_a_column_may_come_later(tmp_path):
    logger = kl.DurableCSVLogger(tmp_path / "history.tsv", separator="\t")
    logger.on_train_begin()
    logger.on_epoch_end(0, {"b": 1.0})
    logger.on_epoch_end(1, {"b": float("inf"), "a": 2})
    assert (tmp_path / "history.tsv").read_text().splitlines() == [
        "epoch\ta\tb",
        "0\tNA\t1.0",
        "1\t2\tinf",
    ]


@pytest.mark.parametrize(
    "text", ["loss\n1.0\n", "epoch,loss\n0,1.0\n1\n", "epoch\n0,1\n", "a b\nc"]
)
def test_a_file_of_something_else_is_not_touched(tmp_path, text):
    path = tmp_path / "history.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must be a table.*Received"):
        kl.DurableCSVLogger(path).on_train_begin()
    assert path.read_text() == text


# Checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, name):
    model = monitor_models.compiled(monitor_models.sequential())
    checkpoint = kl.DurableCheckpoint(
        tmp_path / name, "lipschitz_total", mode="min", save_weights_only=name.endswith(".h5")
    )
    monitor_models.fit(model, kl.LipschitzMonitor(), checkpoint)
    before = (tmp_path / name).read_bytes()
    model.load_weights(tmp_path / name)
    monkeypatch.setattr(_whole_file.os, "replace", full_disk)
    with pytest.raises(OSError, match=r"as it was\. Received: .*No space left"):
        monitor_models.fit(model, kl.LipschitzMonitor(), checkpoint)
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]
