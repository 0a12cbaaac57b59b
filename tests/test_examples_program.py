"""The example from the data to the serving process, cut down to one epoch."""

import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import keras_lipattn as kl

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def _run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    flags = ["--epochs=1", f"--out_dir={folder / 'out'}", f"--data_dir={folder / 'data'}"]
    done = _run(EXAMPLES / "digits.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_every_promised_file_is_there(demo):
    out_dir, _ = demo
    for name in ("bounds.png", "history.csv", "certificate.json", "saved_model/1/saved_model.pb"):
        assert (out_dir / name).stat().st_size > 0


def test_the_certificate_is_that_of_the_export(demo):
    out_dir, _ = demo
    text = (out_dir / "certificate.json").read_text()
    exported = out_dir / "saved_model" / "1" / "assets.extra" / "certificate.json"
    assert json.loads(text) == json.loads(exported.read_text())
    assert kl.Certificate.from_json(text).is_finite


def test_the_history_has_the_bounds(demo):
    out_dir, _ = demo
    with (out_dir / "history.csv").open() as file:
        (row,) = csv.DictReader(file)
    for key in ("lipschitz_total", "lipschitz_block1_attention", "lipschitz_block2_attention"):
        assert 0.0 < float(row[key]) < float("inf")


def test_the_report_says_what_the_files_say(demo):
    out_dir, printed = demo
    certificate = kl.Certificate.from_json((out_dir / "certificate.json").read_text())
    total = re.search(r"certified Lipschitz constant +(\S+)", printed)
    assert total
    # Printed with four digits.
    assert float(total[1]) == pytest.approx(certificate.total, rel=1e-3)
    for name in ("block1_attention", "block2_attention"):
        bound = certificate.row(name).constant
        verdict = "reached" if bound <= 1.0 else "MISSED"
        assert f"{name:32s}  {bound:.4g} (target 1: {verdict})" in printed
    assert len(re.findall(r"certified accuracy at", printed)) == 3


def test_served_radii_are_certified(demo):
    out_dir, printed = demo
    certificate = kl.Certificate.from_json((out_dir / "certificate.json").read_text())
    with np.load(out_dir / "requests.npz") as requests:
        allowed = certificate.certified_radius(requests["logits"])
    _, served = printed.split("Served by another process")
    lines = re.findall(r"^ +\d+ +\d+ +\d+ +(\S+) +(\S+)$", served, re.MULTILINE)
    radii = np.array([float(radius) for _, radius in lines])
    assert radii.shape == allowed.shape
    # Printed with four decimals.
    assert (radii <= allowed + 1e-4).all()


def test_other_answers_than_those_of_keras_are_a_failure(demo, tmp_path):
    out_dir, _ = demo
    with np.load(out_dir / "requests.npz") as requests:
        arrays = dict(requests)
    arrays["logits"] = arrays["logits"] + np.float32(1e-3)
    np.savez(tmp_path / "requests.npz", allow_pickle=False, **arrays)
    done = _run(EXAMPLES / "serve.py", out_dir / "saved_model" / "1", tmp_path / "requests.npz")
    assert done.returncode == 1
    assert "largest difference from Keras" in done.stdout


def test_a_misspelt_flag_or_data_set_is_refused(tmp_path):
    done = _run(EXAMPLES / "digits.py", "--dataset=letters", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "letters" in done.stderr
    assert not (tmp_path / "out").exists()
