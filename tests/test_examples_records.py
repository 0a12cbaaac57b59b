"""The examples that train for certified accuracy: what they record is consistent."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(3)


def _run(program, record, data, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LIPATTN_DATA": str(data)}
    command = [sys.executable, ROOT / "examples" / program, f"--record={record}", *flags]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def _recorded(program, record, data, *flags):
    done = _run(program, record, data, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(record.read_text().splitlines()[-1])


def _write_images(folder, count):
    """Images of two classes, told apart by which half is light."""
    arrays = {}
    for split in ("train", "test"):
        classes = np.arange(count) % 2
        images = RNG.integers(0, 100, (count, 28, 28))
        images[classes == 0, :14] += 100
        images[classes == 1, 14:] += 100
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images.astype(np.uint8), classes
    np.savez(folder / "mnist.npz", **arrays)


def test_the_images_of_a_record_are_those_of_its_table(tmp_path):
    _write_images(tmp_path, 256)
    record = tmp_path / "images.jsonl"
    flags = ("--model=perceptron", "--epochs=1", "--attacked=0")
    run = _recorded("certified_images.py", record, tmp_path, *flags)
    assert run["constant"] <= 1.0 + 1e-6
    shares = [run["clean"], *run["certified"].values()]
    assert shares == sorted(shares, reverse=True)
    table = _run("certified_images.py", record, tmp_path, "--table")
    assert f"| mnist | small | perceptron | 1 | 1 | {100 * run['clean']:.2f} |" in table.stdout


@pytest.mark.parametrize("attention", ["positions", "full", "none", "blocks"])
def test_characters_have_the_constant_that_was_asked_for(tmp_path, attention):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 500
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    record = tmp_path / "lm.jsonl"
    sizes = ("--width=16", "--context=16", "--heads=2", "--units=32", "--layers=1", "--steps=20")
    flags = (f"--attention={attention}", "--lipschitz=2", "--attacked=6", *sizes)
    run = _recorded("language/lipschitz_lm.py", record, tmp_path, *flags)
    # The scale is rounded to float32. The search runs in float32, which rounds by 6e-8 in each
    # layer, and without attention it attains the constant.
    assert run["constant"] <= 2.0 * (1.0 + 1e-6)
    assert run["found"] <= run["constant"] * (1.0 + 1e-6)
    shares = [run["honest"], *run["certified"].values()]
    assert shares == sorted(shares, reverse=True)
    assert run["attack"]["predictions"] == 18
    assert run["attack"]["changed inside"] == 0
    # The attack is not idle.
    assert run["attack"]["changed at 3 times"] > 0
    table = _run("language/lipschitz_lm.py", record, tmp_path, "--table")
    assert f"| {attention} | 2 | 16 |" in table.stdout


def test_a_missing_text_is_named(tmp_path):
    done = _run("language/lipschitz_lm.py", tmp_path / "lm.jsonl", tmp_path)
    assert done.returncode == 1
    assert "tinyshakespeare.txt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("certified_images.py", "images"),
        ("certified_images.py", "peers"),
        ("language/lipschitz_lm.py", "characters"),
    ],
)
def test_the_tables_of_the_results_are_those_of_the_kept_records(tmp_path, program, name):
    kept = ROOT / "docs" / "results" / f"{name}.jsonl"
    page = (ROOT / "docs" / "results.md").read_text()
    _, _, rest = page.partition(f"<!-- table {name} -->\n")
    found, _, _ = rest.partition(f"\n<!-- end {name} -->")
    printed = _run(program, kept, tmp_path, "--table").stdout
    assert found.strip() == printed.strip()
