"""The benchmark of a backend runs, ends in time, and says what it measured."""

import json
import subprocess
import sys

import keras
import pytest
from shared.tensorflow_process import ROOT

from tools.benchmark import backend_attention
from tools.benchmark._backend_accuracy import row_error
from tools.benchmark.backend_attention import Case

SMALL = ["--lengths=16", "--tokens=32", "--features=16", "--heads=2", "--dtypes=bfloat16"]
SHAPE = (2, 16, 16, 2)


def _report(tmp_path, *arguments):
    module = "tools.benchmark.backend_attention"
    command = [sys.executable, "-m", module, "--quick", "--rounds=1", *SMALL, *arguments]
    done = subprocess.run(
        [*command, f"--output={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    report = json.loads((tmp_path / "backend_attention.json").read_text())
    assert report["rows"][-1]["case"] in done.stdout.rpartition("quartiles")[2]
    return report


def test_the_benchmark_compares_all_layers(tmp_path):
    report = _report(tmp_path)
    assert report["machine"]["backend"] == keras.backend.backend()
    product, *errors = report["rows"][:3]
    assert product["unit"] == "GFLOP/s" and product["value"] > 0.0
    assert all(row["unit"] == "total variation" and row["holds"] for row in errors)
    rows = report["rows"][3:]
    kinds = ["forward", "training step"]
    assert [row["case"].split(") ")[1] for row in rows] == [
        *(f"{kind}, {name}" for kind in kinds for name in ("L2", "cosine", "bounded")),
        *(f"caps, {kind}, capped" for kind in kinds),
    ]
    for row in rows:
        name = row["case"].rpartition(", ")[2]
        assert row["value"] > 0.0
        assert 0.0 < row["details"][f"{name} share"] < 1.5
        assert (f"{name} MiB" in row["details"]) == (keras.backend.backend() == "jax")


def test_what_no_longer_fits_in_the_time_is_named(tmp_path):
    report = _report(tmp_path, "--minutes=0")
    assert len(report["rows"]) == 6
    assert all(row["value"] is None for row in report["rows"])
    assert all("skipped: 0 s left" in row["details"]["reason"] for row in report["rows"])


@pytest.mark.parametrize(
    "message", ["RESOURCE_EXHAUSTED: Out of memory allocating", "can't allocate memory: you tried"]
)
@pytest.mark.parametrize("missing", ["cosine", "standard"])
def test_a_layer_that_needs_too_much_memory_costs_only_its_rows(missing, message, monkeypatch):
    steps = backend_attention.layer_step

    def layer_step(layer, inputs, *, training):
        if isinstance(layer, backend_attention.LAYERS[missing]):
            raise RuntimeError(message)
        return steps(layer, inputs, training=training)

    monkeypatch.setattr(backend_attention, "layer_step", layer_step)
    rows = backend_attention.measured(Case("forward", "float32", SHAPE, 1))
    for row in rows:
        name = row.case.rpartition(", ")[2]
        if missing in (name, "standard"):
            assert row.value is None and row.details["reason"] == f"{missing} needs too much memory"
        else:
            assert row.value is not None and row.value > 0.0
        assert (f"{name} ms" in row.details) == (name != missing)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def layer_step(layer, inputs, *, training):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(backend_attention, "layer_step", layer_step)
    with pytest.raises(RuntimeError, match="no such kernel"):
        backend_attention.measured(Case("forward", "float32", SHAPE, 1))


def test_norms_are_measured_against_the_limit():
    (row,) = backend_attention.measured(Case("norms", "float32", SHAPE, 1))
    assert row.value is not None and row.value > 0.0
    speed = row.details["norm GFLOP/s"]
    # Eleven products of 16 x 16 matrices.
    assert speed == pytest.approx(11 * 2.0 * 16**3 / row.value / 1e6)
    backend_attention.add_shares(row, 2.0 * speed)
    assert row.details == {"norm share": 0.5}


@pytest.mark.parametrize("center", [0.0, 5.0, 30.0])
def test_three_parts_of_the_bias_are_as_accurate_as_the_rounding_of_rows(center):
    # A row rounded to bfloat16 twice is wrong by 2**-8 at most, that is 4e-3. Not the scores.
    assert row_error("bfloat16", center=center) < 4e-3
    if center >= 5.0:
        # Squares of 16 features of 5 are 400: one part leaves errors of the scores near 1.
        assert row_error("bfloat16", center=center, parts=1) > 0.1
    if center == 30.0:
        assert row_error("bfloat16", center=center, parts=2) > 1e-2
