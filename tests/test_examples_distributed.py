"""One program gives the same losses under every strategy, and an error without a TPU."""

import csv

import numpy as np
import pytest
import tensorflow as tf
from helpers import strategy_runs

import tpu

EXAMPLES = strategy_runs.TESTS.parent / "examples"
NO_TPU = "No TPU found: .*Received: --tpu="


def test_without_a_tpu_the_message_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TPU_NAME", raising=False)
    with pytest.raises(SystemExit, match=f"{NO_TPU}''"):
        tpu.tpu_strategy("")


@pytest.mark.distributed
@pytest.mark.parametrize("program", [("tpu.py",), ("distributed.py", "--strategy=tpu")])
def test_without_a_tpu_the_program_ends_with_that_message(program):
    (finished,) = strategy_runs.run(EXAMPLES / program[0], *program[1:])
    assert finished.returncode == 1
    assert "Traceback" not in finished.output
    assert "No TPU found" in finished.output


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    found = {}
    for strategy in ("default", "mirrored", "multiworker"):
        out_dir = folder / strategy
        flags = [f"--strategy={strategy}", f"--out_dir={out_dir}", f"--data_dir={folder / 'data'}"]
        (finished,) = strategy_runs.run(EXAMPLES / "distributed.py", "--epochs=2", *flags)
        assert finished.returncode == 0, finished.output
        assert tf.saved_model.contains_saved_model(str(out_dir / "saved_model" / "1"))
        assert not (out_dir / "backup").exists()
        with open(out_dir / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        found[strategy] = {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
def test_the_loss_curve_is_that_of_one_process(strategy, histories):
    alone = histories["default"]
    assert len(alone["loss"]) == 2
    assert alone["loss"][1] < alone["loss"][0]
    for key, values in alone.items():
        # Adam divides by square roots of small numbers: float32 roundings grow over 40 steps.
        np.testing.assert_allclose(
            histories[strategy][key], values, rtol=1e-3, atol=1e-4, err_msg=key
        )
