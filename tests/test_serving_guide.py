"""The commands of docs/serving.md print what the page says."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from helpers import documents

PAGE = (documents.ROOT / "docs" / "serving.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
MODEL = "A model to serve"
# Modules and programs that a section takes for granted.
NEEDS = {
    "TensorFlow": (),
    "`saved_model_cli`": (),
    "C API of TensorFlow": ("cc",),
    "TensorFlow Serving": ("curl", "grpc", "tensorflow_serving"),
    "LiteRT": ("ai_edge_litert",),
    "ONNX Runtime": ("onnx", "onnxruntime", "tf2onnx"),
}
NUMBER = re.compile(r"-?\d+\.?\d*(?:[eE][-+]?\d+)?")


def blocks(section):
    """Pairs of a language and its content, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)


def run(command, folder, **environment):
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(documents.ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(found, printed):
    """Texts are equal but for spaces and the last digits of numbers."""
    assert NUMBER.sub("#", found).split() == NUMBER.sub("#", printed).split(), found
    numbers, wanted = ([*map(float, NUMBER.findall(text))] for text in (found, printed))
    # Float32, and four decimals in some outputs.
    assert numbers == pytest.approx(wanted, rel=1e-4, abs=1e-5), found


def follow(section, folder, change=lambda text: text):
    """Do what a section says, and compare what it prints. The number of outputs compared."""
    compared = 0
    output = None
    for language, content in blocks(section):
        if language == "python":
            output = run([sys.executable, "-c", content], folder)
        elif language == "text":
            check(output, content)
            compared += 1
        elif language == "c":
            (name,) = re.findall(r"^/\* ([\w.]+):", content)
            (folder / name).write_text(content)
        elif language == "console":
            lines = content.splitlines()
            commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            printed = "\n".join(line for line in lines if not line.startswith("$ "))
            program = "\n".join(["set -eo pipefail", *commands])
            check(run(["bash", "-c", change(program)], folder), printed)
            compared += 1
    return compared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    assert follow(MODEL, folder) == 1
    return folder


def test_every_section_with_commands_is_followed():
    with_blocks = {name for name in SECTIONS if any(lang != "sh" for lang, _ in blocks(name))}
    assert with_blocks == {MODEL, *NEEDS}


@pytest.mark.parametrize("section", NEEDS)
def test_a_section_prints_what_it_says(section, folder, request):
    for name in NEEDS[section]:
        if shutil.which(name) is None and importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    change = lambda program: program  # noqa: E731
    if section == "TensorFlow Serving":
        from helpers.serving_stand_in import StandIn

        server = StandIn(folder / "build" / "classifier", "classifier")
        request.addfinalizer(server.close)
        url = server.url.removesuffix("/v1/models/classifier")
        change = lambda program: program.replace("http://localhost:8501", url)  # noqa: E731
    assert follow(section, folder, change) >= 1
