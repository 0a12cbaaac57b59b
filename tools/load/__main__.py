"""Serves an export under load, and compares answers and throughput.

    python -m tools.load --requests=100000 --threads=8 --seed=0

A classifier of sequences is exported and served by TensorFlow in a process without Keras and
without this package. Threads send requests of different batches and lengths at the same time. The
radius of a request must be bit-identical in every answer, and none may be NaN. Rounds of the
signature `certified` alternate with rounds of two that give no radii: `serving_default` of the
same export, and what `model.export` of Keras writes for the model. The program prints the ratios
of their throughputs.

Exit codes: 0 if all radii are identical and both ratios are at least --min_ratio, 1 if not.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags, logging

_REQUESTS = flags.DEFINE_integer("requests", 100000, "Requests of `certified`.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 8, "Threads that send requests.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Largest number of examples.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and requests.", lower_bound=0)
_MIN_RATIO = flags.DEFINE_float("min_ratio", 0.8, "Smallest ratio that passes.", lower_bound=0.0)

_LENGTH, _FEATURES = 16, 32
_SERVING = pathlib.Path(__file__).with_name("_serving.py")


def export(folder: pathlib.Path, seed: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Export a classifier with two residual blocks of attention, with its certificate and plain."""
    import keras

    import keras_lipattn as lip

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((None, _FEATURES), name="tokens")
    x = lip.SpectralDense(64)(inputs)
    for _ in range(2):
        attention = lip.L2MultiHeadAttention(
            4, 16, lipschitz_bound=1.0, max_sequence_length=_LENGTH
        )
        x = lip.Residual(alpha=0.25)([x, attention(lip.CenterNormalization()(x))])
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))
    plain = folder / "plain"
    model.export(plain, verbose=False)
    return lip.export_saved_model(model, folder / "certified", verbose=False).path, plain


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        paths = export(pathlib.Path(folder), _SEED.value)
        numbers = [_REQUESTS.value, _THREADS.value, _BATCH.value, _LENGTH, _SEED.value]
        command = [sys.executable, "-P", _SERVING, *paths, *map(str, numbers)]
        command.append(str(_MIN_RATIO.value))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    app.run(main)
