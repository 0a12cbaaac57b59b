"""Loads the model file that a tool is given, after the modules that its layers come from."""

import importlib
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any


def load_model(path: pathlib.Path, modules: Iterable[str] = ()) -> Any:
    """Load the model in a file.

    Args:
        path: the file.
        modules: modules to import first, from the current folder too.

    Returns:
        A Keras model, not compiled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a module cannot be imported, or the file is no model that Keras can load.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file of this name. Received: {path}")
    import keras

    # Its layers must be known to Keras before the file is read.
    import keras_lipattn  # noqa: F401

    # Python puts the folder of the tool on the path; modules of the user lie in the current one.
    sys.path.append(os.getcwd())
    for module in modules:
        _import(module)
    try:
        return keras.saving.load_model(path, compile=False)
    # A broken file raises errors of zipfile, h5py, json and Keras: BadZipFile, KeyError and others.
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            "The file cannot be loaded as a Keras model; layers of your own are found when their "
            f"module is named by --import. Received: {path} with {message}"
        ) from error


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    # A module may raise anything, or end the program.
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"The module named by --import cannot be imported. Received: --import={module} with "
            f"{message}"
        ) from error
