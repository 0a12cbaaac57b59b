"""Prints the Lipschitz certificate of a saved Keras model, and can guard a build with it.

    python tools/certify.py MODEL.keras [flags]

prints a table with one row per call of a layer (its constant, its factor in the total, where the
constant comes from), the total and its assumptions. With --max=L the exit code says whether the
total is at most L, for use in a build.

Exit codes: 0 certified (and at most --max, if given), 1 not certified, above --max or failed,
2 wrong usage.

Examples:

    # A model on sequences of any length, certified for at most 128 tokens, in the token norm.
    python tools/certify.py model.keras --norm=token --sequence_length=128

    # A build that fails when the constant grows above 50.
    python tools/certify.py model.keras --max=50

    # Ordinary attention has a constant only where its tokens are bounded.
    python tools/certify.py model.keras --input_radius=10

    # For other programs.
    python tools/certify.py model.keras --json=certificate.json --plot=costs.png

    # A model with layers of your own: name the module that registers them with Keras, and rules for
    # them with keras_lipattn.register_rule.
    python tools/certify.py model.keras --import=my_package.layers
"""

import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from model_file import load_model

_NORM = flags.DEFINE_enum(
    "norm",
    "l2",
    ["l2", "token", "linf"],
    "Norm of inputs and outputs: l2, the 2-norm of all entries; token, the largest Euclidean norm "
    "of a token; linf, the largest absolute entry.",
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", None, "Largest length of inputs with an axis of unknown size.", lower_bound=1
)
_INPUT_RADIUS = flags.DEFINE_float(
    "input_radius",
    None,
    "Certify only for inputs whose tokens have at most this Euclidean norm.",
    lower_bound=0.0,
)
_ASSUME_FIXED_MASK = flags.DEFINE_bool(
    "assume_fixed_mask",
    False,
    "Certify for masks that stay fixed even where the model computes them from its input. The "
    "certificate says so.",
)
_MASK = flags.DEFINE_enum(
    "mask",
    None,
    ["full", "causal", "any"],
    "Class of the masks of attention layers whose values are not known from the graph.",
)
_CHECK = flags.DEFINE_bool(
    "check", True, "Try to refute the certificate on a few inputs before it is printed."
)
_MAX = flags.DEFINE_float(
    "max", None, "Fail with exit code 1 when the total is above this.", lower_bound=0.0
)
_JSON = flags.DEFINE_string("json", None, "File to write the certificate to, as JSON.")
_PLOT = flags.DEFINE_string(
    "plot",
    None,
    "File to save a chart of the cost of each layer to; its ending determines the format.",
)
_IMPORT = flags.DEFINE_multi_string(
    "import", [], "Module to import first, for layers and rules that it registers. Repeatable."
)
for _name in ("max", "input_radius"):
    flags.register_validator(
        _name,
        lambda value: value is None or math.isfinite(value),
        f"--{_name} must be a finite number. Without a limit, leave the flag out.",
    )


def parse(argv: list[str]) -> list[str]:
    """Command line without the flags; a wrong flag is wrong usage."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"{error}\nSee --help.", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        raise app.UsageError(f"Expected MODEL.keras. Received: {argv[1:]}", exitcode=2)
    try:
        model = load_model(pathlib.Path(argv[1]), _IMPORT.value)
        # After the arguments have been looked at: loading TensorFlow takes seconds.
        from keras_lipattn import certify
        from keras_lipattn._whole_file import whole_file

        certificate = certify(
            model,
            norm=_NORM.value,
            sequence_length=_SEQUENCE_LENGTH.value,
            input_radius=_INPUT_RADIUS.value,
            assume_fixed_mask=_ASSUME_FIXED_MASK.value,
            mask=_MASK.value,
            check=_CHECK.value,
        )
        print(certificate)
        if _JSON.value is not None:
            with whole_file(_JSON.value) as path:
                path.write_text(certificate.to_json() + "\n")
        if _PLOT.value is not None:
            certificate.plot(_PLOT.value)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if not certificate.is_finite:
        return 1
    if _MAX.value is not None and not certificate.total <= _MAX.value:
        print(f"The total {certificate.total:.6g} is above --max={_MAX.value:g}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
