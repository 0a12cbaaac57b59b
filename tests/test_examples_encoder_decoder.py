"""The example with cross-attention trains and exports a certificate, cut down to one epoch."""

import os
import pathlib
import subprocess
import sys

import keras_lipattn as kl

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_encoder_decoder_is_certified_and_exported(tmp_path):
    flags = ["--epochs=1", "--examples=64", "--length=3", "--width=8", f"--out_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "encoder_decoder.py"), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "1" / "assets.extra" / "certificate.json").read_text()
    certificate = kl.Certificate.from_json(text)
    assert certificate.is_finite and certificate.norm == "token"
    assert f"constant {certificate.total:.4g}" in done.stdout
    caps = [row.constant for row in certificate.rows if "Attention" in row.layer]
    assert len(caps) == 3 and max(caps) <= 4.0
