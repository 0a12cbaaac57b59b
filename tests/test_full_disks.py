"""A full or read-only file system: clear errors, old files unchanged, training continues."""

import hashlib
import math
import os

import keras
import pytest
from helpers import export_cases, monitor_models, small_disk

import keras_lipattn as kl

FULL, READ_ONLY = "No space left on device|write", "Read-only file system"


@pytest.fixture
def disk(tmp_path):
    yield from small_disk.mounted(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def client():
    with export_cases.one_serving_process():
        yield


def content(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "filler"
    }


def spoil(disk, how):
    """Limit writing to 12 kB, or forbid it; return the message of the errors to expect."""
    if how == "full":
        disk.fill(leaving=12288)
        return FULL
    disk.make_read_only()
    return READ_ONLY


def wide_model():
    """Its weights take some 70 kB."""
    inputs = keras.Input((64,))
    return keras.Model(inputs, kl.SpectralDense(3, name="head")(keras.layers.Dense(256)(inputs)))


hows = pytest.mark.parametrize("how", ["full", "read-only"])


@hows
@pytest.mark.parametrize("exists", [False, True])
def test_an_export_that_cannot_be_written_leaves_what_was_there(disk, how, exists):
    model = wide_model()
    if exists:
        kl.export_saved_model(model, disk.folder / "model", verbose=False)
    words = spoil(disk, how)
    before = content(disk.folder)
    with pytest.raises(kl.ExportError, match=rf"as it was\. Received: [\s\S]*({words})"):
        kl.export_saved_model(model, disk.folder / "model", verbose=False)
    assert content(disk.folder) == before
    assert sorted(set(os.listdir(disk.folder)) - {"filler"}) == (["model"] if exists else [])


@hows
def test_a_plot_that_cannot_be_written_leaves_the_old_one_and_can_be_drawn_elsewhere(
    disk, how, tmp_path_factory
):
    monitor = kl.LipschitzMonitor()
    model = monitor_models.compiled(monitor_models.sequential(), run_eagerly=True)
    monitor_models.fit(model, monitor)
    certificate = kl.certify(model)
    monitor.plot(disk.folder / "bounds.png")
    certificate.plot(disk.folder / "costs.png")
    before = content(disk.folder)
    words = spoil(disk, how)
    for draw, name in ((monitor.plot, "bounds.png"), (certificate.plot, "costs.png")):
        with pytest.raises(OSError, match=rf"{name} .*as it was\. Received: .*({words})"):
            draw(disk.folder / name)
        draw(tmp_path_factory.mktemp("elsewhere") / name)
    assert content(disk.folder) == before


@hows
def test_training_goes_on_without_backup_and_history(disk, how):
    model = wide_model()
    model.compile("sgd", "mse", jit_compile=False, run_eagerly=True)
    x, y = keras.ops.ones((4, 64)), keras.ops.ones((4, 3))

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                spoil(disk, how)
            if epoch == 2 and how == "full":
                disk.empty()

    callbacks = [
        kl.LipschitzMonitor(),
        kl.DurableCSVLogger(disk.folder / "history.csv"),
        kl.DurableBackup(disk.folder / "backup"),
        Spoil(),
    ]
    with pytest.warns(UserWarning, match=r"Training continues.* Received: ") as caught:
        history = model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks).history
    assert len(history["loss"]) == 3
    assert all(math.isfinite(total) for total in history["lipschitz_total"])
    warned = [warning for warning in caught if warning.category is UserWarning]
    backup = kl.DurableBackup(disk.folder / "backup")
    rows = (disk.folder / "history.csv").read_text().splitlines()[1:]
    if how == "full":
        # A history is short enough; the backup of the second epoch is missing.
        assert len(warned) == 1
        assert backup.completed == 3 and len(rows) == 3
    else:
        assert len(warned) == 4
        assert backup.completed == 1 and len(rows) == 1
    assert not list(disk.folder.rglob(".keras_lipattn-*"))
    # What is there is whole.
    again = wide_model()
    again.compile("sgd", "mse", jit_compile=False)
    again.fit(x, y, epochs=backup.completed, verbose=0, callbacks=[backup])


@hows
def test_a_checkpoint_that_cannot_be_written_stops_training_and_leaves_the_old_one(disk, how):
    model = wide_model()
    model.compile("sgd", "mse", jit_compile=False, run_eagerly=True)
    data = keras.ops.ones((4, 64)), keras.ops.ones((4, 3))
    for name in ("model.keras", "model.weights.h5"):
        checkpoint = kl.DurableCheckpoint(
            disk.folder / name, save_weights_only=name.endswith(".h5")
        )
        model.fit(*data, verbose=0, callbacks=[checkpoint])
    before = content(disk.folder)
    words = spoil(disk, how)
    for name in before:
        checkpoint = kl.DurableCheckpoint(
            disk.folder / name, save_weights_only=name.endswith(".h5")
        )
        with pytest.raises(OSError, match=rf"as it was\. Received: [\s\S]*({words})"):
            model.fit(*data, verbose=0, callbacks=[checkpoint])
    assert content(disk.folder) == before
