"""The character model with a certified constant: its constant is kept, and attacks fail inside."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = ("--width=16", "--context=12", "--units=32", "--layers=1", "--heads=2", "--batch=8")


@pytest.mark.parametrize("attention", ["positions", "blocks"])
def test_a_small_model_keeps_its_constant_under_attack(attention, tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 60
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    record = tmp_path / "record.jsonl"
    flags = [*SMALL, "--steps=20", "--attacked=6", f"--attention={attention}", f"--record={record}"]
    subprocess.run(
        [sys.executable, "examples/language/lipschitz_lm.py", "--lipschitz=2", *flags],
        cwd=ROOT,
        env={**os.environ, "LIPATTN_DATA": str(tmp_path), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    run = json.loads(record.read_text())
    # The slack of norms in float64.
    assert run["found"] <= run["constant"] <= 2.0 * (1.0 + 1e-6)
    assert run["attack"]["predictions"] == 18
    assert run["attack"]["changed inside"] == 0
    # The attack is not idle.
    assert run["attack"]["changed at 3 times"] > 0
