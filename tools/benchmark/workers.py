"""What one, two and four workers of `tf.distribute` compute, each and together.

Not among the benchmarks that `make bench` runs: its processes share the cores of one machine, so it
tells how much work there is, in processor time, and nothing about speed.
"""

import json
import pathlib
import sys
import tempfile
import time
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_lipattn import LipschitzMonitor
from keras_lipattn.distribution import multi_worker, run_workers
from tools.benchmark._models import encoder
from tools.benchmark._program import run
from tools.benchmark._report import Row
from tools.benchmark._rounds import Spread

CLAIM = "Steps share their work among workers; each worker certifies the whole model by itself"
DEPTH, WIDTH, TOKENS, BATCH = 4, 128, 32, 32
WORKERS = (1, 2, 4)
EPOCHS, BATCHES = 4, 10
WAYS = {"no monitor": None, "monitor": {}, "penalty": {"penalty": 0.1}}
TIMEOUT = 900.0


def measure():
    rows = []
    for workers in WORKERS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tools.benchmark.workers", "worker", folder]
            for worker in run_workers(command, workers, timeout=TIMEOUT):
                if worker.returncode:
                    raise RuntimeError(f"A worker failed. Received: {worker.output[-2000:]!r}")
            found = [json.loads(path.read_text()) for path in pathlib.Path(folder).iterdir()]
        assert len(found) == workers
        for way in WAYS:
            batch, end = (
                [1e3 * Spread.of(one[way][what]).median for one in found]
                for what in ("batch", "end")
            )
            details = {"all ms": sum(batch), "end of an epoch, each ms": Spread.of(end).median}
            case = f"{workers} workers, batch with {way}, each"
            rows.append(Row.sample(case, batch, "ms", details=details))
    return rows


class _Before(keras.callbacks.Callback):
    """The first callback: when an epoch has ended, and how much its batches have taken."""

    def __init__(self):
        super().__init__()
        self.seconds, self.ended = [], 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        self.ended = time.process_time()
        self.seconds.append((self.ended - self._began) / BATCHES)


class _After(keras.callbacks.Callback):
    """The last callback: how much those between have taken at the end of an epoch."""

    def __init__(self, before):
        super().__init__()
        self.seconds, self._before = [], before

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.process_time() - self._before.ended)


def train(folder):
    """What a worker does: fits in each way, and writes what it took."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * BATCHES, TOKENS, WIDTH)).astype("float32")
    y = rng.integers(0, 10, len(x))
    found = {}
    for way, options in WAYS.items():
        with strategy.scope():
            model = multi_worker(encoder(DEPTH, WIDTH, TOKENS))
            # A rate so small that the weights stay finite on labels which mean nothing.
            model.compile(
                keras.optimizers.SGD(1e-6), keras.losses.SparseCategoricalCrossentropy(True)
            )
        before = _Before()
        after = _After(before)
        between = [] if options is None else [LipschitzMonitor(condense=False, **options)]
        with warnings.catch_warnings():
            # The first callback reads no logs.
            warnings.simplefilter("ignore")
            model.fit(
                x,
                y,
                batch_size=BATCH,
                epochs=EPOCHS,
                verbose=0,
                callbacks=[before, *between, after],
            )
        # The first epoch traces.
        found[way] = {"batch": before.seconds[1:], "end": after.seconds[1:]}
    path = pathlib.Path(folder) / f"{strategy.cluster_resolver.task_id}.json"
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        train(sys.argv[2])
    else:
        run("workers", CLAIM, measure)
