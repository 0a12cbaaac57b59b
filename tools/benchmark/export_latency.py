"""Size and latency of an exported model, ours and the same with standard attention."""

import math
import pathlib
import tempfile

import tensorflow as tf

from keras_lipattn.export import export_saved_model
from tools.benchmark._models import encoder
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import tokens

CLAIM = (
    "An exported model is smaller and answers faster than the same model with standard attention "
    "(4 blocks of width 256, 128 tokens; sizes and times of the standard model over ours)"
)
DEPTH, WIDTH, LENGTH = 4, 256, 128
BATCHES = [1, 8]
# How a checkpoint names the values of variables.
VALUE = ".ATTRIBUTES/VARIABLE_VALUE"


def measure():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        standard = encoder(DEPTH, WIDTH, LENGTH, standard=True)
        standard.export(folder / "standard", verbose=False)
        exported = export_saved_model(encoder(DEPTH, WIDTH, LENGTH), folder / "ours", verbose=False)
        paths = {"standard": folder / "standard", "ours": exported.path}
        return [weights_row(standard, paths["ours"]), size_row(paths), *latency_rows(paths)]


def weights_row(standard, path):
    # `model.export` of Keras 3.15 writes every variable twice: files alone would flatter us.
    checkpoint = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    shapes = checkpoint.get_variable_to_shape_map()
    ours = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(VALUE))
    details = {"standard": standard.count_params(), "ours": ours}
    return Row("number of weights", details["standard"] / ours, "x", at_least=1.0, details=details)


def size_row(paths):
    sizes = {
        name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20
        for name, path in paths.items()
    }
    ratio = sizes["standard"] / sizes["ours"]
    details = {f"{name} MiB": size for name, size in sizes.items()}
    return Row("size on disk", ratio, "x", at_least=1.0, details=details)


def latency_rows(paths):
    # Kept, because a signature alone does not keep the variables of its model.
    models = {name: tf.saved_model.load(path) for name, path in paths.items()}
    rows = []
    for batch in BATCHES:
        x = tokens(batch, LENGTH, WIDTH)
        calls = {name: answer(model, x) for name, model in models.items()}
        times = alternate(calls, rounds=FLAGS.rounds)
        rows.append(Row.ratio(f"batch {batch}", times, "standard", "ours", at_least=1.0))
    return rows


def answer(model, x):
    signature = model.signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    return lambda: signature(**{name: x})


if __name__ == "__main__":
    run("export_latency", CLAIM, measure)
