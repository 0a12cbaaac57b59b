"""The Python blocks of docs/backends.md run under JAX."""

import os
import subprocess
import sys

import keras
import pytest
from helpers import documents

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="the page is about JAX")


PROGRAMS = {key: code for key, code in documents.programs().items() if "backends.md" in key}


@pytest.mark.parametrize("block", PROGRAMS)
def test_python_blocks_run(block, tmp_path):
    (tmp_path / "block.py").write_text(PROGRAMS[block])
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(documents.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
