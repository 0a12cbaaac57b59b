"""Exports in plain TensorFlow, and in the command `saved_model_cli`."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.runtime_contract import RuntimeContract, subject  # noqa: F401

# The command reads one request and ends. TensorFlow takes seconds to start, so one process runs it
# many times.
PROGRAM = """
import json, sys
from absl import flags
from tensorflow.python.tools import saved_model_cli

for line in sys.stdin:
    flags.FLAGS(["saved_model_cli", *json.loads(line)])
    saved_model_cli.run()
    print("answered", flush=True)
"""


class TestPlainTensorFlow(RuntimeContract):
    """Import of Keras and of this package is blocked in the process that serves."""

    def start(self, subject, folder):  # noqa: F811
        return subject.tensorflow


class TestCommand(RuntimeContract):
    @pytest.fixture(scope="module")
    @classmethod
    def process(cls):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        yield process
        process.communicate()

    @pytest.fixture(scope="class")
    @classmethod
    def serve(cls, subject, folder, process):  # noqa: F811
        def serve(arrays):
            np.savez(folder / "request.npz", **arrays)
            inputs = ";".join(f"{name}={folder}/request.npz[{name}]" for name in arrays)
            flags = ["--tag_set=serve", "--signature_def=certified", f"--inputs={inputs}"]
            flags += [f"--dir={subject.path}", f"--outdir={folder}/answer", "--overwrite"]
            print(json.dumps(flags), file=process.stdin, flush=True)
            assert "answered\n" in iter(process.stdout.readline, "")
            return {name: np.load(folder / "answer" / f"{name}.npy") for name in subject.outputs}

        return serve


def test_the_command_shows_the_signature(subject):  # noqa: F811
    if subject.name != "softmax over sequences":
        pytest.skip("one start of TensorFlow is enough")
    program = "from tensorflow.python.tools.saved_model_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "show", f"--dir={subject.path}", "--all"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "signature_def['certified']" in done.stdout
    assert all(f"outputs['{name}']" in done.stdout for name in subject.outputs)
