"""The tools say in one line what is wrong with a model file or a module."""

import importlib
import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import pytest
from keras import layers

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = {"certify.py": [], "export_saved_model.py": ["served"]}


def _model(path):
    inputs = keras.Input((3,))
    keras.Model(inputs, layers.Dense(2)(inputs)).save(path)


def _without(name):
    def broken(path):
        whole = path.with_name("whole.keras")
        _model(whole)
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
            for member in source.namelist():
                if member != name:
                    target.writestr(member, source.read(member))

    return broken


def _changed(name, content):
    def broken(path):
        _without(name)(path)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, content)

    return broken


def _truncated(path):
    _model(path)
    path.write_bytes(path.read_bytes()[:500])


def _overwritten(path):
    _model(path)
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(bytes(content))


BROKEN = {
    "no zip": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
    "no config.json": _without("config.json"),
    "no weights": _without("model.weights.h5"),
    "config of another kind": _changed("config.json", "[]"),
    "config that is cut off": _changed("config.json", '{"class_name": "Func'),
    "config without a class": _changed("config.json", "{}"),
    "weights that are no weights": _changed("model.weights.h5", b"weights"),
    "truncated": _truncated,
    "overwritten": _overwritten,
    "empty": lambda path: path.write_bytes(b""),
}


def run(tool, folder, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def load(path, modules=()):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        load_model = importlib.import_module("model_file").load_model
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return load_model(path, modules)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_value_error_of_one_line(tmp_path, name):
    path = tmp_path / "model.keras"
    BROKEN[name](path)
    with pytest.raises(ValueError, match=r"cannot be loaded as a Keras model.*Received") as raised:
        load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tools_print_no_traceback(tmp_path, tool):
    BROKEN["no config.json"](tmp_path / "model.keras")
    found = run(tool, tmp_path, "model.keras", *TOOLS[tool])
    assert found.returncode == 1
    assert "Traceback" not in found.stderr and "cannot be loaded as a Keras" in found.stderr
    (tmp_path / "raises.py").write_text("raise RuntimeError('nothing\\nhere')")
    found = run(tool, tmp_path, "model.keras", *TOOLS[tool], "--import=raises")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "--import=raises with RuntimeError: nothing here" in found.stderr
    assert not (tmp_path / "served").exists()
