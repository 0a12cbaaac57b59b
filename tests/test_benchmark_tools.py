"""The benchmarks: their arithmetic, their files, and that the peers are fair."""

import importlib
import json
import os
import pathlib
import time

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from keras import ops

from tools.benchmark import growth, memory
from tools.benchmark.__main__ import NAMES
from tools.benchmark._budget import run_within
from tools.benchmark._models import encoder
from tools.benchmark._peers import (
    CachedAttention,
    PlainDistanceAttention,
    SpectralNormalizedAttention,
)
from tools.benchmark._program import FLAGS
from tools.benchmark._report import Report, Row, machine, table
from tools.benchmark._rounds import Rounds, Spread, alternate


class FakeClock:
    """A clock that candidates move themselves."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def candidate(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run


def timed(durations, **options):
    clock = FakeClock()
    candidates = {name: clock.candidate(name, s) for name, s in durations.items()}
    return clock, alternate(candidates, wall=clock, processor=clock, **options)


def test_times_are_per_call_whatever_the_repeats():
    # Dyadic durations: sums of them are exact.
    _, rounds = timed({"slow": 0.25, "fast": 0.0625}, rounds=5, seconds=1.0)
    np.testing.assert_array_equal(rounds.wall["slow"], np.full(5, 0.25))
    np.testing.assert_array_equal(rounds.processor["fast"], np.full(5, 0.0625))
    assert rounds.ratio("slow", "fast") == Spread(4.0, 4.0, 4.0)
    assert rounds.processor_ratio("slow", "fast") == 4.0
    assert rounds.milliseconds("slow") == 250.0


def test_candidates_are_repeated_until_the_time_asked_for():
    clock, _ = timed({"slow": 0.5, "fast": 0.125}, rounds=1, warm_up=0, seconds=1.0)
    # One call of each to see how long it takes, then a round.
    assert clock.calls == ["slow", "fast"] + 2 * ["slow"] + 8 * ["fast"]


def test_rounds_alternate_and_turn_around():
    clock, _ = timed({"a": 1.0, "b": 1.0, "c": 1.0}, rounds=3, warm_up=0, seconds=0.0)
    assert "".join(clock.calls) == "abc" + "abc" + "cba" + "abc"


def test_ratios_are_taken_within_a_round():
    # The machine is ten times slower in the second round: ratios do not see it.
    times = {"slow": np.array([2.0, 30.0, 4.0]), "fast": np.array([1.0, 10.0, 1.0])}
    rounds = Rounds(wall=times, processor=times)
    assert rounds.ratio("slow", "fast") == Spread(3.0, 2.5, 3.5)


def test_a_coarse_processor_clock_does_not_divide_by_zero():
    clock = FakeClock()
    candidates = {name: clock.candidate(name, 0.5) for name in "ab"}
    rounds = alternate(candidates, rounds=2, wall=clock, processor=lambda: 0.0)
    assert rounds.processor_ratio("a", "b") == 1.0


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="Received: rounds=0"):
        alternate({}, rounds=0)


@pytest.mark.parametrize(
    "row, holds",
    [
        (Row("a", 1.5, "x"), None),
        (Row("a", None, "x", at_least=1.0), None),
        (Row("a", 1.5, "x", at_least=1.5), True),
        (Row("a", 1.4, "x", at_least=1.5), False),
        (Row("a", 1.5, "x", at_most=1.5), True),
        (Row("a", 1.6, "x", at_most=1.5), False),
        (Row("a", 1.6, "x", at_least=1.0, at_most=1.5), False),
    ],
)
def test_a_target_holds_when_it_is_reached(row, holds):
    assert row.holds is holds


def some_report():
    rows = [
        Row("pair", 1.25, "x", (1.0, 1.5), at_least=1.2, details={"ours ms": 3.5, "bytes": 12}),
        Row("left out", None, "MiB", at_most=10.0, details={"reason": "too large"}),
    ]
    return Report("some", "Ours is faster", rows, rounds=3, machine=machine())


def test_a_report_survives_json_and_says_what_holds(tmp_path, capsys):
    report = some_report()
    report.publish(tmp_path / "new")
    text = (tmp_path / "new" / "some.json").read_text()
    assert Report.from_json(text) == report
    content = json.loads(text)
    assert set(content) == {"name", "claim", "rows", "rounds", "machine"}
    assert all(
        set(row) == {"case", "value", "unit", "spread", "at_least", "at_most", "details", "holds"}
        for row in content["rows"]
    )
    assert [row["holds"] for row in content["rows"]] == [True, None]
    printed = capsys.readouterr().out
    assert "Ours is faster" in printed
    assert f"{report.machine['cores']} cores" in printed
    assert table(report.rows) in printed


def test_numbers_which_json_lacks_are_refused():
    report = Report("some", "", [Row("a", float("nan"), "x")], rounds=1, machine={})
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json()


def test_the_table_is_markdown_with_three_digits():
    rows = [Row("long case", 1234.567, "ms"), Row("b", 0.012345, "s", (0.01, 0.02), at_most=3.0)]
    assert table(rows).splitlines() == [
        "| case      | median   | quartiles       | target  | holds | details |",
        "|-----------|----------|-----------------|---------|-------|---------|",
        "| long case | 1235 ms  |                 |         |       |         |",
        "| b         | 0.0123 s | 0.0100 - 0.0200 | <= 3.00 | yes   |         |",
    ]


@pytest.mark.parametrize("variable, expected", [("3", 3), (None, os.cpu_count())])
def test_the_machine_states_its_threads(monkeypatch, variable, expected):
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        if variable is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, variable)
    found = machine()
    assert found["threads within operations"] == expected
    assert found["threads between operations"] == expected
    assert found["processor"] and found["memory GiB"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_makes_one_claim(name):
    module = importlib.import_module(f"tools.benchmark.{name}")
    assert module.CLAIM and callable(module.measure)


def test_cached_decoding_of_the_standard_layer_is_its_causal_pass():
    layer = CachedAttention(2, 4)
    x = keras.random.normal((3, 5, 8))
    expected = layer(x, x, use_causal_mask=True)
    cache = layer.init_cache(3, 5)
    decoded = []
    for position in range(5):
        output, cache = layer.decode(x[:, position : position + 1], cache, position)
        decoded.append(output)
    # Sums of a few numbers of size one in float32.
    np.testing.assert_allclose(ops.concatenate(decoded, axis=1), expected, atol=1e-5)


def test_plain_distance_attention_weighs_by_distance():
    layer = PlainDistanceAttention(2, 3)
    x = keras.random.normal((2, 5, 6), seed=1)
    output = ops.convert_to_numpy(layer(x))
    query, key, value = (
        ops.convert_to_numpy(dense(x)).astype("float64").reshape(2, 5, 2, 3)
        for dense in (layer.query, layer.key, layer.value)
    )
    distances = np.square(query[:, :, None] - key[:, None]).sum(-1)
    weights = np.exp(-distances / np.sqrt(3.0))
    weights /= weights.sum(axis=2, keepdims=True)
    mixed = np.einsum("bqkh,bkhd->bqhd", weights, value).reshape(2, 5, 6)
    expected = layer.output_projection(ops.convert_to_tensor(mixed, "float32"))
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_projections_of_the_spectral_peer_are_normalized_in_training():
    layer = SpectralNormalizedAttention(2, 3)
    x = keras.random.normal((2, 5, 6), seed=2)
    # Power iteration, one step a call.
    for _ in range(15):
        output = layer(x, training=True)
    assert output.shape == x.shape
    for projection in (layer.query, layer.key, layer.value, layer.output_projection):
        kernel = ops.convert_to_numpy(projection.layer.kernel)
        np.testing.assert_allclose(np.linalg.norm(kernel, 2), 1.0, atol=5e-2)


def test_models_differ_in_nothing_but_attention():
    ours, peer = (encoder(2, 16, 4, heads=2, standard=standard) for standard in (False, True))
    kinds = [[type(layer).__name__ for layer in model.layers] for model in (ours, peer)]
    assert [k for k in kinds[0] if k != "L2MultiHeadAttention"] == [
        k for k in kinds[1] if k != "MultiHeadAttention"
    ]
    assert kinds[0].count("L2MultiHeadAttention") == kinds[1].count("MultiHeadAttention") == 2


def test_memory_of_a_step_comes_on_top_of_the_process():
    peak, at_rest = memory.measure_mib("ours", 32)
    assert 0.0 < at_rest <= peak


def test_growth_of_memory_is_told_with_and_without_the_process_at_rest(monkeypatch):
    monkeypatch.setattr(memory, "in_process", lambda which, length: (500.0 + length / 64, 500.0))
    monkeypatch.setattr(memory, "available_mib", lambda: 2000.0)
    FLAGS.mark_as_parsed()
    rows = {row.case: row for row in memory.measure()}
    assert rows["ours, 16384 tokens"].value == 756.0 and rows["ours, 16384 tokens"].holds
    growth = rows["ours, 16384 over 8192 tokens"]
    assert growth.value == 756.0 / 628.0
    assert growth.details == {"without the process at rest": 2.0}
    assert rows["standard, 2048 tokens"].value == 532.0
    # Five matrices of 4 heads * 16384^2 floats: 20 GiB.
    assert rows["standard, 16384 tokens"].value is None
    assert "20 GiB" in rows["standard, 16384 tokens"].details["reason"]


SMALL = {
    "attention_speed": dict(SHAPES={(2, 4, 8, 2): (1.0, 1.0)}),
    "bounded_speed": dict(SHAPES=[(2, 4, 8, 2)]),
    "caps_cost": dict(SHAPE=(2, 4, 8, 2), JIT_DEPTH=1, JIT_SHAPE=(2, 4, 8, 2)),
    "certify_time": dict(SIZES=[(1, 16)]),
    "certified_serving": dict(DEPTH=1, WIDTH=16, LENGTH=4, BATCHES=[1], CLIENTS=[1, 2]),
    "decoding": dict(SIZES=[(2, 4)], DECODED=2, FEATURES=8, HEADS=2),
    "monitor_cost": dict(DEPTH=1, WIDTH=16, TOKENS=4, BATCH=2, BATCHES=2),
    "spectral_peers": dict(SHAPE=(2, 4, 8, 2)),
}


@pytest.mark.parametrize("name", SMALL)
def test_benchmarks_run_to_the_end_on_small_cases(name, monkeypatch):
    module = importlib.import_module(f"tools.benchmark.{name}")
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(module, constant, value)
    FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(rounds=1):
        rows = module.measure()
    assert rows and all(row.value is not None and row.value > 0.0 for row in rows)
    assert len({row.case for row in rows}) == len(rows)
    report = Report(name, module.CLAIM, rows, 1, machine())
    assert Report.from_json(report.to_json()) == report


def test_exponents_are_fitted_to_the_upper_half():
    sizes = [1, 2, 4, 8, 16, 32]
    values = [7.0, 7.0, 7.0, *(3.0 * size**1.5 for size in sizes[3:])]
    assert growth.exponent(sizes, values) == pytest.approx(1.5)
    # What is lost in the process is no growth; what stopped early has no exponent.
    assert growth.exponent(sizes, [1.0, 1.0, 1.0, 2.0, 4.0, 8.0], least=2.0) == pytest.approx(1.0)
    assert growth.exponent(sizes, [1.0] * 6, least=1.0) is None
    assert growth.exponent([1, 2], [1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("point", "sizes", "reason"),
    [
        # The seconds double and double again: 32 s at 16384 tokens, then 64.
        (lambda size: (size / 512.0, 1.0), [1024, 2048, 4096, 8192, 16384], "about 64 s next"),
        (lambda size: (1.0, size**2 / 2.0**14), [1024, 2048, 4096], "about 4 GiB next"),
        (lambda size: (1.0, 1.0), growth.SIZES["tokens"], None),
    ],
)
def test_a_line_stops_before_what_takes_too_much(point, sizes, reason, monkeypatch):
    monkeypatch.setattr(growth, "in_process", lambda axis, what, who, size, _: point(size))
    monkeypatch.setattr(growth, "available_mib", lambda: 4096.0)
    FLAGS.mark_as_parsed()
    line = growth.line("tokens", "forward", "ours")
    assert line.sizes == sizes and line.stopped == reason
    assert line.row().details.get("stopped") == reason


@pytest.mark.parametrize("axis", growth.MEASURED)
def test_what_grows_runs_at_small_sizes(axis, monkeypatch, tmp_path):
    small = dict(batch=1, tokens=8, width=16, heads=1, depth=1)
    monkeypatch.setattr(growth, "SHAPES", {axis: {"layer": small, "model": small}})
    monkeypatch.setattr(growth.decoding, "DECODED", 2)
    for what in growth.MEASURED[axis]:
        for who in ("ours", "standard") if growth.has_standard(what) else ("ours",):
            size = 2 * small[axis]
            prepare, call = growth.program(axis, what, who, size, tmp_path / what)
            prepare()
            call()
    assert pathlib.Path(tmp_path / "export").exists() == ("export" in growth.MEASURED[axis])


def test_a_point_is_measured_in_a_process_of_its_own():
    seconds, mib = growth.in_process("batch", "training step", "standard", 256, 1)
    assert seconds > 0.0
    # Attention weights: 256 x 4 heads of 64 x 64 entries take 16 MiB.
    assert 16.0 < mib < 1000.0


def test_growth_is_drawn_with_its_exponents(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "in_process", lambda *arguments: (1e-6 * arguments[3], 4.0))
    FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(rounds=1, output=str(tmp_path)):
        rows = growth.measure()
    assert all(row.value == pytest.approx(1.0) for row in rows)
    assert len({row.case for row in rows}) == len(rows)
    report = Report("growth", growth.CLAIM, rows, 1, machine())
    assert Report.from_json(report.to_json()) == report
    assert {path.name for path in tmp_path.iterdir()} == {"growth_time.png", "growth_memory.png"}
    # Every line is in some panel.
    for row in rows:
        axis, what = row.details["axis"], row.details["what"]
        assert any(axis == shown and what.startswith(names) for shown, names in growth.PANELS)


def test_a_case_that_fails_or_dies_costs_only_its_own_result():
    dies = "__import__('os').kill(__import__('os').getpid(), 9)"
    outcomes = list(run_within(300.0, eval, ["1 + 1", "1 / 0", dies, "2 + 2"]))
    assert outcomes == [
        (2, None),
        (None, "ZeroDivisionError: division by zero"),
        (None, "the process ended with status -9"),
        (4, None),
    ]


def test_a_case_that_is_not_done_in_time_is_stopped_and_the_rest_skipped():
    stopped, skipped = run_within(2.0, time.sleep, [3600.0, 0.0])
    assert stopped == (None, "stopped: not done after 2 s, when time was up")
    assert skipped[0] is None and skipped[1].startswith("skipped: 0 s left")
