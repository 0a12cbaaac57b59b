"""Checks an export of `export_saved_model` from its files alone.

    python tools/verify_export.py PATH

prints one line: verified, or why not. PATH is the folder of one version, such as
build/classifier/1. Neither Keras nor the Python code of the model has a part in the check; the
SavedModel is loaded by TensorFlow after its operations were compared with a list of harmless ones.

Exit codes: 0 verified, 1 not verified, 2 wrong usage.

The manifest detects accidents. Anyone with write access to the folder can write a new manifest, so
sign it: see docs/verification.md.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"Expected PATH. Received: {arguments}\nSee --help.", file=sys.stderr)
        return 2
    # After the arguments have been looked at: loading TensorFlow takes seconds.
    from keras_lipattn.export import verify_export

    found = verify_export(pathlib.Path(arguments[0]))
    print(found)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
