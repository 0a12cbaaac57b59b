"""Exports random models and checks the exports with `verify_export`.

    python -m tools.soundness.exports --models=100 --seed=0

counts the exports that are verified, those with a layer that has no independent check, and those
that are refused for any other reason, and prints the largest relative difference between the
certified total and the one from the served weights. Models go on until --models of them have an
independent check of every layer.

Exit codes: 0 all of these are verified, 1 one of them is refused, 2 wrong usage.
"""

import collections
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import tensorflow as tf
from absl import app, flags, logging

import keras_lipattn
from keras_lipattn.export import ExportError, verification, verify_export
from tools.soundness.generate import random_subject

_MODELS = flags.DEFINE_integer("models", 100, "Number of exports to verify.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the models.", lower_bound=0)
_NORMS = ("l2", "token", "linf")
_NO_CHECK = "no independent check of "
_WEIGHTS_TOO_LARGE = 1e30


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}", exitcode=2)
    logging.set_verbosity(logging.ERROR)
    tf.get_logger().setLevel("ERROR")
    # A new process for each export would take most of the time.
    verification.serve = _serve_here
    verified, refused, largest, index = 0, [], 0.0, -1
    unchecked: collections.Counter[str] = collections.Counter()
    uncertified = 0
    while verified + len(refused) < _MODELS.value:
        index += 1
        norm = _NORMS[index % len(_NORMS)]
        with tempfile.TemporaryDirectory() as folder:
            path = _export(index, norm, pathlib.Path(folder))
            if path is None:
                uncertified += 1
                continue
            found = verify_export(path)
        keras.backend.clear_session()
        if found:
            verified += 1
            largest = max(largest, abs(found.recomputed / found.certified - 1.0))
        elif found.reason.startswith(_NO_CHECK):
            unchecked[" ".join(found.reason.removeprefix(_NO_CHECK).split()[:2])] += 1
        else:
            refused.append(index)
            print(f"model {index}, norm {norm}: {found}", flush=True)
    print(
        f"seed {_SEED.value}: {index + 1} models, {verified} verified, {len(refused)} refused, "
        f"{unchecked.total()} with no independent check, {uncertified} without an export\n"
        f"largest relative difference of the total: {largest:.2e}\n"
        f"no independent check: {dict(unchecked.most_common())}"
    )
    return 1 if refused else 0


def _export(index: int, norm: str, folder: pathlib.Path) -> pathlib.Path | None:
    """Export model number `index`; `None` if it has no useful certificate."""
    subject = random_subject(_SEED.value, index)
    model = subject.model
    try:
        exported = keras_lipattn.export_saved_model(
            model,
            folder / "model",
            norm=norm,
            input_radius=subject.input_radius,
            example_batch=subject.points,
            tolerance=1e-3,
            verbose=False,
        )
    except ExportError:
        return None
    return exported.path if 0.0 < exported.certificate.total < _WEIGHTS_TOO_LARGE else None


def _serve_here(folder, requests):
    loaded = tf.saved_model.load(str(folder))
    answers = {}
    for name, inputs in requests.items():
        serve = loaded.signatures[name]
        specs = serve.structured_input_signature[1]
        tensors = {key: tf.cast(array, specs[key].dtype) for key, array in inputs.items()}
        answers[name] = {key: value.numpy() for key, value in serve(**tensors).items()}
    return answers


if __name__ == "__main__":
    sys.exit(app.run(main))
