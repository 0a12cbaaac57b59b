"""`--import` of the command-line tools: modules of the user, from the folder of the user."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = {"certify": (), "export_saved_model": ("served",)}
# A model that names the class can only be read once the module is imported.
MODULE = """
import keras

@keras.saving.register_keras_serializable(package="mine")
class Ones(keras.initializers.Ones):
    pass
"""
SCRIPT = """
import keras, my_layers

x = keras.Input((4,))
y = keras.layers.Dense(3, kernel_initializer=my_layers.Ones())(x)
keras.Model(x, y).save("model.keras")
"""


def run(tool, folder, *flags):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / f"{tool}.py", "model.keras", *TOOLS[tool], *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_layers.py").write_text(MODULE)
    (folder / "broken.py").write_text("raise RuntimeError('two\\nlines')")
    (folder / "ending.py").write_text("import sys\nsys.exit(0)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, cwd=folder, env=environment)
    return folder


@pytest.mark.parametrize("tool", TOOLS)
def test_a_module_in_the_current_folder_is_found(tool, folder):
    done = run(tool, folder, "--import=my_layers")
    assert done.returncode == 0, done.stderr
    assert "Lipschitz constant" in done.stdout


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("missing_module", "ModuleNotFoundError: No module named 'missing_module'"),
        ("broken", "RuntimeError: two lines"),
        ("ending", "SystemExit: 0"),
    ],
)
def test_a_module_that_fails_is_one_line_of_error(tool, module, message, folder):
    done = run(tool, folder, f"--import={module}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    assert len(lines) == 1 and f"--import={module} with {message}" in lines[0]
