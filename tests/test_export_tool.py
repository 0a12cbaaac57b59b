"""The command line: from a .keras file to a model that other programs serve."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import export_cases as cases

ROOT = pathlib.Path(__file__).parents[1]
TOOL = ROOT / "tools" / "export_saved_model.py"


def start(program, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )


def run(program, *arguments):
    process = start(program, *arguments)
    output, errors = process.communicate()
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tool")


@pytest.fixture(scope="module")
def model(folder):
    model = cases.classifier()
    model.save(folder / "model.keras")
    np.savez(folder / "example.npz", tokens=cases.tokens(3))
    return model


@pytest.fixture(scope="module")
def exported(folder, model):
    """Results of two tools that export to the same folder at the same time."""
    arguments = folder / "model.keras", folder / "served", f"--example_batch={folder}/example.npz"
    processes = [start(TOOL, *arguments) for _ in range(2)]
    return [(*process.communicate(), process.returncode) for process in processes]


def test_tool_exports_and_prints_the_certificate(exported, folder):
    for output, errors, code in exported:
        assert code == 0, errors
        assert "Lipschitz constant" in output and "l2_multi_head_attention" in output
        assert "3 examples differ by at most" in output
    assert (folder / "served" / "1" / "assets.extra" / "certificate.json").is_file()


def test_two_exports_at_once_are_two_complete_versions(exported, folder):
    served = folder / "served"
    assert sorted(os.listdir(served)) == ["1", "2"]
    names = [
        {str(path.relative_to(served / version)) for path in (served / version).rglob("*")}
        for version in ("1", "2")
    ]
    assert names[0] == names[1]
    printed = {
        line.removeprefix("exported to ")
        for output, _, _ in exported
        for line in output.splitlines()
        if line.startswith("exported to ")
    }
    assert printed == {str(served / "1"), str(served / "2")}
    # The certificate contains no time, so it is the same.
    one, two = (served / version / "assets.extra" / "certificate.json" for version in ("1", "2"))
    assert one.read_text() == two.read_text()


def test_an_independent_client_runs_the_export(exported, folder, model):
    """`saved_model_cli` comes with TensorFlow and does not use Keras."""
    answers = folder / "answers"
    answers.mkdir()
    code = (
        "import sys\n"
        "for name in ('keras', 'keras_lipattn'): sys.modules[name] = None\n"
        "from tensorflow.python.tools.saved_model_cli import main\n"
        "sys.exit(main())"
    )
    process = start(
        "-c",
        code,
        "run",
        "--dir",
        folder / "served" / "1",
        "--tag_set=serve",
        "--signature_def=certified",
        f"--inputs=tokens={folder}/example.npz[tokens]",
        f"--outdir={answers}",
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    answer = {path.stem: np.load(path) for path in answers.glob("*.npy")}
    assert sorted(answer) == ["class", "logits", "margin", "radius"]
    expected = np.asarray(model(cases.tokens(3)))
    assert (answer["class"] == expected.argmax(axis=-1)).all()
    softmax = np.exp(answer["logits"])
    softmax /= softmax.sum(axis=-1, keepdims=True)
    # The Keras model divides by upper bounds of the norms, which are up to 1e-3 too large.
    np.testing.assert_allclose(softmax, expected, atol=5e-3)
    assert (answer["radius"] > 0.0).all()


def test_a_missing_file_is_told_at_once(folder):
    code, _, errors = run(TOOL, folder / "missing.keras", folder / "x")
    assert code == 1 and "no model file of this name. Received" in errors


def test_a_broken_file_is_told_without_traceback(folder):
    (folder / "broken.keras").write_text("no model")
    code, _, errors = run(TOOL, folder / "broken.keras", folder / "x")
    assert code == 1 and "cannot be loaded as a Keras model" in errors
    assert "Traceback" not in errors
    assert not (folder / "x").exists()


def test_wrong_usage_and_help():
    code, _, errors = run(TOOL, "--norm=l7")
    assert code == 2 and "l7" in errors
    _, output, errors = run(TOOL, "--help")
    for word in ("sequence_length", "allow_uncertified", "Exit codes", "certified"):
        assert word in output + errors
