"""The benchmark of a backend runs and says what it measured."""

import json
import subprocess
import sys

import keras
from shared.tensorflow_process import ROOT


def test_the_benchmark_compares_both_layers(tmp_path):
    module = "tools.benchmark.backend_attention"
    small = ["--lengths=16", "--tokens=32", "--features=16", "--heads=2", "--dtypes=float32"]
    command = [sys.executable, "-m", module, "--quick", "--rounds=1", *small]
    subprocess.run([*command, f"--output={tmp_path}"], cwd=ROOT, capture_output=True, check=True)
    report = json.loads((tmp_path / "backend_attention.json").read_text())
    assert report["machine"]["backend"] == keras.backend.backend()
    product, *rows = report["rows"]
    assert product["unit"] == "GFLOP/s" and product["value"] > 0.0
    assert [row["case"].split(") ")[1] for row in rows] == ["forward", "training step"]
    for row in rows:
        assert row["value"] > 0.0
        assert 0.0 < row["details"]["ours share"] < 1.5
        assert ("ours MiB" in row["details"]) == (keras.backend.backend() == "jax")
