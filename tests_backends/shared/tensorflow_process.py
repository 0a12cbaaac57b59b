"""The other side of a comparison: the same cases under TensorFlow, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(command: str, folder: pathlib.Path, *arguments: object):
    """What `command` of this program answers under TensorFlow, from JSON.

    Args:
        command: A key of `COMMANDS`.
        folder: Folder for the answer.
        *arguments: Further arguments of the command.

    Raises:
        RuntimeError: If there is no environment with TensorFlow, or the process fails.
    """
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"`make .venv` installs TensorFlow. Received: no file {python}")
    answer = folder / f"{command}.json"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("JAX", "XLA"))},
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": os.pathsep.join(
            str(ROOT / name) for name in (".", "tests", "tests_backends")
        ),
    }
    done = subprocess.run(
        [python, "-m", "shared.tensorflow_process", command, answer, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed. Received: {done.stderr[-4000:]}")
    return json.loads(answer.read_text())


def _record():
    from shared import cases

    return cases.record()


def _export(path, folder):
    """Loads a model, certifies and exports it, and runs what was exported."""
    import keras
    import numpy as np
    import tensorflow as tf
    from shared import cases

    import keras_lipattn as kl

    # An optimizer of another backend cannot be loaded here.
    model = keras.saving.load_model(path, compile=False)
    certificate, exported = kl.export_saved_model(model, folder, verbose=False)
    served = tf.saved_model.load(str(exported)).signatures["serving_default"]
    x = cases.data()[0]
    (answer,) = served(tf.constant(x)).values()
    return {
        "certified": kl.certify(model).total,
        "exported": certificate.total,
        "outputs": np.asarray(model(x), np.float64).tolist(),
        "served": np.asarray(answer, np.float64).tolist(),
    }


COMMANDS = {"record": _record, "export": _export}

if __name__ == "__main__":
    answer = COMMANDS[sys.argv[1]](*sys.argv[3:])
    pathlib.Path(sys.argv[2]).write_text(json.dumps(answer))
