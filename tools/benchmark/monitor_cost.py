"""What `LipschitzMonitor` costs at the end of an epoch and in every batch."""

import time

import keras
import numpy as np

from keras_lipattn import LipschitzMonitor
from tools.benchmark._models import change_weights, encoder
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import Spread

CLAIM = "LipschitzMonitor takes a few seconds an epoch on a model of 12 layers of width 512"
DEPTH, WIDTH, TOKENS, BATCH = 12, 512, 16, 4
EPOCHS, BATCHES = 2, 8


class _Clock(keras.callbacks.Callback):
    """Seconds of every batch but the first of each epoch, which traces or allocates."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if batch > 0:
            self.seconds.append(time.perf_counter() - self._start)


def measure():
    model = encoder(DEPTH, WIDTH, TOKENS)
    size = f"{DEPTH} blocks of width {WIDTH}"
    seconds, processor = epoch_seconds(model)
    details = {"processor s": Spread.of(processor).median}
    rows = [Row.sample(f"{size}, end of an epoch", seconds, "s", at_most=1.5, details=details)]
    # A rate so small that the weights stay finite on labels which mean nothing. No XLA: it would
    # compile each variant for minutes.
    model.compile(
        keras.optimizers.SGD(1e-6),
        keras.losses.SparseCategoricalCrossentropy(True),
        jit_compile=False,
    )
    variants = {
        "bounds alone": dict(),
        "running bounds": dict(running_freq=1),
        "penalty": dict(penalty=0.1),
    }
    plain, watched = [], {name: [] for name in variants}
    # Each traces the training step of a deep model anew.
    for _ in range(1 if FLAGS.quick else max(1, FLAGS.rounds // 5)):
        plain.append(batch_seconds(model))
        for name, options in variants.items():
            watched[name].append(batch_seconds(model, LipschitzMonitor(**options)))
    for name, seconds in watched.items():
        ratios = Spread.of(np.divide(seconds, plain))
        rows.append(
            Row(
                f"{size}, batch with {name} over batch without monitor",
                ratios.median,
                "x",
                (ratios.low, ratios.high),
                details={"without ms": Spread.of(plain).median * 1e3},
            )
        )
    return rows


def epoch_seconds(model):
    """Seconds of the ends of some epochs after the weights have moved; processor seconds too."""
    monitor = LipschitzMonitor()
    monitor.set_model(model)
    monitor.on_train_begin()
    seconds, processor = [], []
    for epoch in range(max(1, FLAGS.rounds // 3)):
        change_weights(model)
        start, busy = time.perf_counter(), time.process_time()
        monitor.on_epoch_end(epoch, {})
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    monitor.on_train_end()
    return seconds, processor


def batch_seconds(model, *callbacks):
    """Median seconds of a batch of `fit`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * BATCHES, TOKENS, WIDTH)).astype("float32")
    y = rng.integers(0, 10, len(x))
    clock = _Clock()
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[*callbacks, clock])
    return float(np.median(clock.seconds))


if __name__ == "__main__":
    run("monitor_cost", CLAIM, measure)
