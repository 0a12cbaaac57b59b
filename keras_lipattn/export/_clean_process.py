"""Serving an exported model in a process without Keras and without this package."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_lipattn.export.export_error import ExportError

_PROGRAM = pathlib.Path(__file__).with_name("_serving_program.py")
_TIMEOUT_SECONDS = 900
Answers = dict[str, dict[str, np.ndarray]]


def serve(model: str | os.PathLike, requests: Mapping[str, Mapping[str, np.ndarray]]) -> Answers:
    """Loads a SavedModel in a new process and calls its signatures there, on the CPU.

    Args:
        model: Folder of the SavedModel.
        requests: From the name of a signature to its named inputs.

    Returns:
        From the name of a signature to its named outputs.

    Raises:
        ExportError: If the process fails; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = os.path.join(folder, "asked.npz"), os.path.join(folder, "answered.npz")
        request: dict[str, Any] = {
            f"{signature}:{name}": _plain(array)
            for signature, inputs in requests.items()
            for name, array in inputs.items()
        }
        np.savez(asked, **request)
        # -P: the folder of the program holds modules of this package.
        command = [sys.executable, "-P", str(_PROGRAM), os.fspath(model), asked, answered]
        # This process may hold all the memory of the accelerator.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        try:
            run = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                "The exported model did not answer in a process of its own. "
                f"Received: no answer in {_TIMEOUT_SECONDS} seconds"
            ) from error
        if run.returncode != 0:
            raise ExportError(
                "The exported model cannot be served in a process without Keras. "
                f"Received: exit code {run.returncode} and\n{run.stderr[-3000:]}"
            )
        answers: Answers = {}
        with np.load(answered, allow_pickle=False) as arrays:
            for key in arrays.files:
                signature, name = key.split(":", 1)
                answers.setdefault(signature, {})[name] = arrays[key]
        return answers


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype which numpy can write: bfloat16 as float32, objects as strings."""
    if array.dtype.kind == "V":
        return array.astype(np.float32)
    return array.astype(str) if array.dtype.kind in "OS" else array
