"""Exports a saved Keras model as a SavedModel with its Lipschitz certificate inside.

    python tools/export_saved_model.py MODEL.keras FOLDER [flags]

writes the next version, FOLDER/1/ or FOLDER/2/ and so on, in the layout of TensorFlow Serving,
with assets.extra/certificate.json, and prints the certificate. Classifiers have the signature
`certified` in addition to `serving_default`: logits, class, margin and the radius within which the
class provably cannot change.

The export is served in a process without Keras and compared with MODEL.keras before it is
published. After a failure FOLDER is as it was.

Exit codes: 0 exported, 1 refused or failed, 2 wrong usage.

Examples:

    # A model on sequences of any length, certified for at most 128 tokens.
    python tools/export_saved_model.py model.keras build/classifier --sequence_length=128

    # A model with custom layers: name the module that registers them with Keras.
    python tools/export_saved_model.py model.keras build/classifier --import=my_package.layers

    # Compare on real data: one array per input, by its name.
    python tools/export_saved_model.py model.keras build/classifier --example_batch=batch.npz
"""

import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from absl import app, flags
from model_file import load_model

_NORM = flags.DEFINE_enum(
    "norm",
    "l2",
    ["l2", "token", "linf"],
    "Norm of the certificate, of inputs and outputs: l2, the 2-norm of all entries; token, the "
    "largest Euclidean norm of a token; linf, the largest absolute entry.",
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length",
    None,
    "Largest length of inputs whose length varies. By default the smallest max_sequence_length of "
    "the layers.",
    lower_bound=1,
)
_INPUT_RADIUS = flags.DEFINE_float(
    "input_radius",
    None,
    "Certify only for inputs whose tokens have at most this Euclidean norm. Ordinary dot-product "
    "attention has a constant only then.",
)
_ASSUME_FIXED_MASK = flags.DEFINE_bool(
    "assume_fixed_mask",
    False,
    "Certify for masks that stay fixed even where the model computes them from its input. The "
    "certificate says so.",
)
_ALLOW_UNCERTIFIED = flags.DEFINE_bool(
    "allow_uncertified",
    False,
    "Also export a model without a finite certificate. The files say so, and why.",
)
_EXAMPLE_BATCH = flags.DEFINE_string(
    "example_batch",
    None,
    "An .npz file with the inputs for the comparison: one array per input by its name, or a single "
    "array. By default random numbers.",
)
_IMPORT = flags.DEFINE_multi_string(
    "import", [], "Module to import first, for layers that it registers with Keras. Repeatable."
)
flags.register_validator(
    "input_radius",
    lambda value: value is None or math.isfinite(value),
    "--input_radius must be a finite number. Without a limit, leave the flag out.",
)


def load_batch(path: str) -> np.ndarray | dict[str, np.ndarray]:
    """The arrays of a file, by the names of the inputs where there are several."""
    with np.load(path, allow_pickle=False) as content:
        arrays = dict(content)
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def parse(argv: list[str]) -> list[str]:
    """Command line without the flags; a wrong flag ends the program with exit code 2."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"{error}\nSee --help.", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str]) -> int:
    if len(argv) != 3:
        raise app.UsageError(f"Expected MODEL.keras and FOLDER. Received: {argv[1:]}", exitcode=2)
    try:
        model = load_model(pathlib.Path(argv[1]), _IMPORT.value)
        # Imported late: loading TensorFlow takes seconds.
        from keras_lipattn.export import export_saved_model

        batch = None if _EXAMPLE_BATCH.value is None else load_batch(_EXAMPLE_BATCH.value)
        export_saved_model(
            model,
            argv[2],
            norm=_NORM.value,
            sequence_length=_SEQUENCE_LENGTH.value,
            input_radius=_INPUT_RADIUS.value,
            assume_fixed_mask=_ASSUME_FIXED_MASK.value,
            allow_uncertified=_ALLOW_UNCERTIFIED.value,
            example_batch=batch,
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
