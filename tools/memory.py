"""Trains, certifies and exports many times in one process, and measures its memory.

    python -m tools.memory --epochs=200 --certificates=500 --exports=50

The training has a `LipschitzMonitor` with a penalty. After every epoch, certificate and export the
resident memory of the process is read. The first tenth fills caches and is left out; the program
prints the slope of a line through the rest and how far the memory grew along it.

Exit codes: 0 if no phase grew by more than --max_growth MiB, 1 if one did. Linux only.
"""

import gc
import pathlib
import tempfile
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags, logging

import keras_lipattn as lip

_EPOCHS = flags.DEFINE_integer("epochs", 200, "Epochs of training.", lower_bound=0)
_CERTIFICATES = flags.DEFINE_integer("certificates", 500, "Calls of `certify`.", lower_bound=0)
_EXPORTS = flags.DEFINE_integer("exports", 50, "Exports.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and data.", lower_bound=0)
_MAX_GROWTH = flags.DEFINE_float(
    "max_growth", 10.0, "Largest growth in MiB after the first tenth of a phase.", lower_bound=0.0
)

_LENGTH, _FEATURES, _CLASSES = 16, 32, 10


def resident_mib() -> float:
    """Memory of this process without what it no longer reaches, in MiB."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def build_model() -> keras.Model:
    inputs = keras.Input((_LENGTH, _FEATURES))
    x = lip.SpectralDense(64)(inputs)
    for _ in range(2):
        attention = lip.L2MultiHeadAttention(4, 16, lipschitz_bound=1.0)
        x = lip.Residual(alpha=0.25)([x, attention(lip.CenterNormalization()(x))])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, lip.SpectralDense(_CLASSES, name="logits")(x))


def train(model: keras.Model, epochs: int, seed: int) -> list[float]:
    """Memory after each epoch."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(256, _LENGTH, _FEATURES)).astype(np.float32)
    y = rng.integers(0, _CLASSES, 256)
    memory: list[float] = []
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    measure = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: memory.append(resident_mib())
    )
    monitor = lip.LipschitzMonitor(penalty=0.01)
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0, callbacks=[monitor, measure])
    return memory


def repeat(action: Callable[[], object], model: keras.Model, count: int) -> list[float]:
    """Memory after each of `count` actions. The weights change, so that no cache knows them."""
    memory = []
    kernel = model.get_layer("logits").kernel
    for _ in range(count):
        kernel.assign(0.999 * kernel)
        action()
        memory.append(resident_mib())
    return memory


def report(name: str, memory: list[float]) -> float:
    """Print the slope of a phase; the growth along it."""
    rest = memory[len(memory) // 10 :]
    if len(rest) < 2:
        return 0.0
    slope = float(np.polyfit(np.arange(len(rest)), rest, 1)[0])
    growth = slope * len(rest)
    print(
        f"{len(memory)} {name}: {memory[0]:.1f} MiB after the first, {rest[0]:.1f} after a tenth, "
        f"{rest[-1]:.1f} at the end; slope {1024.0 * slope:.2f} KiB each, {growth:.1f} MiB in all",
        flush=True,
    )
    return growth


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    keras.utils.set_random_seed(_SEED.value)
    model = build_model()
    growths = [report("epochs", train(model, _EPOCHS.value, _SEED.value))]
    certified = repeat(lambda: lip.certify(model), model, _CERTIFICATES.value)
    growths.append(report("certificates", certified))

    def export():
        with tempfile.TemporaryDirectory(prefix="memory-") as folder:
            lip.export_saved_model(model, folder, verbose=False)

    growths.append(report("exports", repeat(export, model, _EXPORTS.value)))
    return int(max(growths) > _MAX_GROWTH.value)


if __name__ == "__main__":
    app.run(main)
