"""The programs of the papers: what they measure is right, what is kept was measured by them."""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import json
import pathlib
import shutil
import types

import blow_up
import char_lm
import char_scale
import continuous_depth
import conversion
import density
import invertible
import measures
import numpy as np
import padded_series
import pretrained
import pytest
import report
import structure
import tensorflow as tf
import tightness
import vowels

import keras_lipattn as kl

KEPT = pathlib.Path(__file__).parents[1] / "docs" / "papers"
PROGRAMS = {
    "blow_up": blow_up,
    "structure": structure,
    "tightness": tightness,
    "invertible": invertible,
    "density": density,
    "padded_series": padded_series,
    "continuous_depth": continuous_depth,
    "measures": measures,
    "pretrained": pretrained,
    "conversion": conversion,
    "char_lm": char_lm,
    "char_scale": char_scale,
}


def kept(name):
    return json.loads((KEPT / f"{name}.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A copy of the page and its results."""
    return shutil.copytree(KEPT, tmp_path / "papers")


@pytest.mark.parametrize("name", PROGRAMS)
def test_tables_of_the_page_are_those_of_the_kept_results(name, folder):
    (folder / f"{name}.png").unlink()
    PROGRAMS[name].main(["--redraw", "--folder", str(folder)])
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert (folder / report.PAGE).read_text() == (KEPT / report.PAGE).read_text()


def test_redrawing_without_results_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run without --redraw.*Received: .*blow_up\.json"):
        blow_up.main(["--redraw", "--folder", str(tmp_path)])


def test_page_without_a_place_for_a_table_is_refused(tmp_path):
    (tmp_path / report.PAGE).write_text("nothing")
    with pytest.raises(ValueError, match=r"Received: .*README\.md with 0"):
        report.table("blow_up", tmp_path, ["a"], [["b"]])


def test_blow_up_runs_and_grows_on_every_path(tmp_path):
    blow_up.main(["--folder", str(tmp_path)])
    results = json.loads((tmp_path / "blow_up.json").read_text())
    assert len(results["curves"]) == 4
    for curve in results["curves"].values():
        assert curve["exponent"] > 0.9
        assert curve["norm"][-1] > 20 * results["certified"]
    for row in results["enforced"]:
        assert row["found"] <= row["sound"] * (1 + 1e-6)
        # The published constant holds for one head alone.
        assert (row["found"] > 1.2 * row["published"]) == (row["heads"] > 1)
        assert max(curve["l2_norm"]) <= results["certified"] <= results["published"]


def test_kept_conversions_change_no_output_and_the_penalty_lowers_the_constant():
    results = kept("conversion")
    assert {row["model"] for row in results["layers"]} == {"MiniLM", "rxnmapper"}
    for row in results["layers"]:
        assert row["difference"] <= 1e-5 and row["touching"] == 0.0
    rows = {row["model"]: row for row in results["digits"]["rows"]}
    assert rows["converted"]["accuracy"] == rows["trained"]["accuracy"]
    assert rows["penalized"]["accuracy"] >= rows["converted"]["accuracy"] - 0.01
    assert rows["penalized"]["constant"] <= 0.1 * rows["converted"]["constant"]


def test_conversion_runs_without_the_packages(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    examples = rng.random((64, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 64)
    data = types.SimpleNamespace(train=examples, test=examples)
    monkeypatch.setattr(conversion, "load_images", lambda *_: data)
    monkeypatch.setattr(conversion, "EPOCHS", {"digits": 1})
    monkeypatch.setattr(conversion.pretrained_models.importlib.util, "find_spec", lambda name: None)
    conversion.main(["--folder", str(tmp_path)])
    assert "MiniLM is left out. The weights of MiniLM come" in capsys.readouterr().out
    results = json.loads((tmp_path / "conversion.json").read_text())
    assert results["layers"] == [] and results["digits"]["difference"] <= 1e-5
    assert [row["model"] for row in results["digits"]["rows"]] == list(conversion.MODELS)
    assert all(np.isfinite(row["constant"]) for row in results["digits"]["rows"])


def dense_jacobian(y, mask):
    """Jacobian of the head by automatic differentiation, `(N, d, N, d)`."""
    point = tf.constant(y)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = tightness.pairs(point, mask)[1] @ point
    return tape.jacobian(value, point).numpy()


@pytest.mark.parametrize("mask", tightness.MASKS)
def test_matrix_free_products_are_those_of_the_jacobian(mask):
    rng = np.random.default_rng(0)
    y, h, u = rng.normal(size=(3, 6, 2))
    jacobian = dense_jacobian(y, mask)
    pushed = tightness.push(tf.constant(y), tf.constant(h), mask)
    np.testing.assert_allclose(pushed, np.tensordot(jacobian, h, 2), rtol=1e-10, atol=1e-12)
    pulled = tightness.pull(tf.constant(y), tf.constant(u), mask)
    np.testing.assert_allclose(pulled, np.tensordot(u, jacobian, 2), rtol=1e-10, atol=1e-12)
    steps = tf.constant(200)
    value, _, _ = tightness.singular_value(tf.constant(y), tf.constant(h), mask, steps)
    assert float(value) == pytest.approx(np.linalg.norm(jacobian.reshape(12, 12), 2), rel=1e-6)


def test_row_sums_are_those_of_the_jacobian():
    rng = np.random.default_rng(0)
    y, u = rng.normal(size=(6, 2)), rng.normal(size=2)
    last = dense_jacobian(y, "causal")[-1]
    value = tightness.row_sum(tf.constant(y), tf.constant(u), "linf")[0]
    assert float(value) == pytest.approx(np.abs(last[0]).sum(), rel=1e-10)
    value = tightness.row_sum(tf.constant(y), tf.constant(u), "token")[0]
    blocks = np.einsum("ajb,a->jb", last, u / np.linalg.norm(u))
    assert float(value) == pytest.approx(np.linalg.norm(blocks, axis=1).sum(), rel=1e-10)


def test_searches_find_what_is_known():
    rng = np.random.default_rng(0)
    # Section 9 of docs/theory.md, and equality for odd N.
    assert tightness.largest_singular_value(4, "full", 6, 60, rng) >= 2.092
    assert tightness.largest_singular_value(4, "causal", 6, 60, rng) >= 1.931
    found = tightness.largest_row_sum(5, 2, "token", 0, 10, rng)
    assert found == pytest.approx(tightness.bounds("token", 2, 5, "full")[1], rel=1e-6)


def test_kept_lower_bounds_are_below_the_certificates():
    rows = kept("tightness")["rows"]
    assert {row["tokens"] for row in rows} >= {2, 64, 1024}
    for row in rows:
        # Six digits are kept.
        assert row["found"] <= row["certified"] * (1 + 1e-5)
        assert row["certified"] <= row["published"] * (1 + 1e-5)
        if row["setting"] == "token" and row["tokens"] % 2:
            assert row["found"] == pytest.approx(row["certified"], rel=1e-5)
        if row["setting"] == "l2" and row["mask"] == "full":
            assert row["certified"] <= 2.0 * row["found"]


def test_kept_inverses_are_accurate():
    results = kept("invertible")
    stacks = {(row["stack"], row["coefficient"]): row for row in results["stacks"]}
    for row in stacks.values():
        for acceleration in ("plain", "anderson"):
            assert row[acceleration]["converged"]
            # For c = 0.99, each inverse may magnify rounding errors by 100 instead of by 10.
            limit = 1e-4 if row["coefficient"] > 0.9 else 1e-5
            assert row[acceleration]["error"] <= limit
    for coefficient in (0.9, 0.99):
        slow = stacks["perceptrons that use their constant", coefficient]
        assert 2 * slow["anderson"]["steps"] <= slow["plain"]["steps"]
    for method in results["log_det"]["methods"]:
        if method["truncation_error"] == 0.0:
            assert abs(method["standard_errors"]) <= 3.0
    ends = {
        (curve["attention"], curve["case"], curve["coefficient"]): curve["error"][-1]
        for curve in results["curves"]
    }
    assert (
        ends["dot-product", "weights x 2", 0.5] is None
        or ends["dot-product", "weights x 2", 0.5] > 1.0
    )
    assert all(error <= 1e-6 for (kind, *_), error in ends.items() if kind == "L2")


def test_iteration_inverts_a_contraction_and_reports_where_it_leaves_the_numbers():
    x = tf.ones((1, 2, 2))
    shrinking = invertible.errors_of_iteration(lambda x: 0.5 * x, x)
    np.testing.assert_allclose(shrinking[:3], [0.5, 0.25, 0.125])
    growing = invertible.errors_of_iteration(lambda x: 1e3 * x, x)
    assert growing[0] == pytest.approx(1e3)
    assert growing[-1] is None


def test_critical_stack_has_its_input_where_the_derivative_is_largest():
    x = invertible.critical_input()
    (attention,) = invertible.critical_branches(0, x)
    y = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(y)
        entry = attention(y)[0, 0, 0]
    slope = float(tape.gradient(entry, y)[0, 0, 0])
    # The own-token part 1 + 2 S* of the certificate, for the one token between the groups.
    assert slope > 0.5 * attention.lipschitz().value


def test_series_are_read_with_their_lengths():
    text = "@classLabel true 1\n@data\n" + "\n".join(
        ":".join([",".join(str(10 * c + t) for t in range(length)) for c in range(12)] + [speaker])
        for length, speaker in ((7, "1"), (29, "9"))
    )
    series, mask, speakers = vowels.parse(text)
    assert speakers.tolist() == [0, 8]
    assert mask.sum(axis=1).tolist() == [7, 29]
    np.testing.assert_array_equal(series[0, 6], 10 * np.arange(12) + 6)
    np.testing.assert_array_equal(series[0, 7:], 0.0)
    np.testing.assert_array_equal(series[1, 28], 10 * np.arange(12) + 28)


def test_density_of_series_counts_their_steps_only(monkeypatch):
    monkeypatch.setattr(density, "BLOCKS", 1)
    flow = density.Flow(density.VARIANTS[-1], 0)
    flow.build((None, vowels.LENGTH, vowels.CHANNELS))
    rng = np.random.default_rng(0)
    series = rng.normal(size=(2, vowels.LENGTH, vowels.CHANNELS)).astype("float32")
    mask = np.arange(vowels.LENGTH) < np.array([[7], [20]])
    x = np.where(mask[..., None], series, 0.0).astype("float32")
    whole = np.asarray(flow.log_density(tf.constant(x), tf.constant(mask), method="exact"))
    z, found = flow.sample(mask, 0)
    np.testing.assert_allclose(flow.transform(found.solution, mask=mask), z, atol=1e-5)
    # Entries of padded places do not matter: the tolerance is that of float32 sums.
    other = np.where(mask[..., None], series, 5.0).astype("float32")
    again = np.asarray(flow.log_density(tf.constant(other), tf.constant(mask), method="exact"))
    np.testing.assert_allclose(again, whole, rtol=1e-5)


@pytest.mark.parametrize("variant", padded_series.VARIANTS)
def test_padding_does_not_reach_the_class_of_a_series(variant):
    model = padded_series.build(variant)
    rng = np.random.default_rng(0)
    series = rng.normal(size=(3, vowels.LENGTH, vowels.CHANNELS)).astype("float32")
    mask = np.arange(vowels.LENGTH) < np.array([[7], [20], [29]])
    other = np.where(mask[..., None], series, 1e4).astype("float32")
    np.testing.assert_array_equal(model([series, mask]), model([other, mask]))
    mean = "valid steps" in variant
    assert kl.certify(model).total <= (1.0 if mean else vowels.LENGTH**-0.5) * (1.0 + 1e-5)


def test_kept_series_are_certified_below_what_attacks_leave():
    results = kept("padded_series")
    assert all(run["contradictions"] == 0 for run in results["runs"])
    for run in results["runs"]:
        assert np.all(np.array(run["certified"]) <= run["under attack"])


def test_kept_residual_networks_converge_to_the_flow_under_its_certificate():
    results = kept("continuous_depth")
    orders = {"euler": 1, "midpoint": 2, "rk4": 4}
    for row in results["convergence"]:
        for method, curve in row["methods"].items():
            assert curve["order"] == pytest.approx(orders[method], abs=0.1)
            assert row["certified"][method] <= row["certified"]["flow"]
    for row in results["parting"]:
        assert max(row["pair"], row["critical"], row["cloud"]) <= row["steps"] <= row["flow"]


def test_reference_flow_is_that_of_a_linear_equation():
    x = np.random.default_rng(0).normal(size=(1, 3, 2))
    end = continuous_depth.reference(lambda x: 0.5 * x, x, 2.0, decay=0.2)
    np.testing.assert_allclose(end, np.exp(0.6) * x, rtol=1e-10)
    # Two branches: the second takes over linearly.
    end = continuous_depth.reference([lambda x: 0.5 * x, lambda x: -0.1 * x], x, 2.0)
    np.testing.assert_allclose(end, np.exp(0.4) * x, rtol=1e-10)


def test_fitted_order_is_that_of_a_power_and_forgets_roundings():
    depths = [2, 4, 8, 16, 32]
    assert continuous_depth.order(depths, [k**-3.0 for k in depths]) == pytest.approx(3.0)
    assert continuous_depth.order(depths, [0.1, 0.025, 6.25e-3, 1e-15, 2e-15]) == pytest.approx(2.0)


def test_stretch_is_the_norm_of_the_jacobian():
    layer = continuous_depth.unit_head(5, 1.0, 0.5, 2)
    x = continuous_depth.critical_input(5)
    point = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(point)
        y = layer(point)
    expected = np.linalg.norm(tape.jacobian(y, point).numpy().reshape(5, 5), 2)
    assert continuous_depth.stretch(layer, x) == pytest.approx(expected, rel=1e-9)


def test_wasserstein_distances_are_right_where_they_are_known():
    rng = np.random.default_rng(0)
    x, shift = rng.normal(size=(5, 2)), np.array([3.0, 4.0])
    equal, other = np.ones(5), rng.uniform(0.5, 1.0, size=5)
    for power in (1, 2):
        for weights in (equal, other):
            distance = measures.wasserstein(x, x + shift, weights, weights, power)
            assert distance == pytest.approx(5.0, rel=1e-9)
    # A sixth of the mass moves by 3, whichever program computes it.
    line = np.array([[0.0, 0.0], [3.0, 0.0]])
    moved = measures.wasserstein(line, line, np.array([2.0, 4.0]), np.array([3.0, 3.0]), 1)
    assert moved == pytest.approx(0.5, rel=1e-9)


def test_dot_product_attention_on_measures_counts_copies():
    x = np.random.default_rng(0).normal(size=(3, 2))
    counts = np.array([1, 3, 2])
    weighted = measures.attend("dot-product", tf.constant(x), tf.constant(counts.astype(float)))
    copies = np.repeat(x, counts, axis=0)
    plain = measures.attend("dot-product", tf.constant(copies), tf.ones(6, "float64"))
    np.testing.assert_allclose(np.repeat(weighted, counts, axis=0), plain, rtol=1e-10)


@pytest.mark.parametrize("kind", measures.KINDS)
def test_expansion_on_a_ball_is_under_its_constant(kind):
    found = measures.largest_expansion(kind, 0.5, 3, 1, np.random.default_rng(0))
    assert 1.0 < found <= measures.constant_on_ball(kind, 0.5)


def test_kept_expansions_are_under_their_constants():
    results = kept("measures")
    assert max(results["splitting"].values()) < 1e-12
    for row in results["balls"]:
        assert 1.0 < row["found"] <= row["constant"]
    free = results["without_a_ball"]
    found = [row["L2"] for row in free["rows"]]
    assert max(free["critical"], *found) <= free["certified"]
    # Dot-product attention has no constant: it leaves that of L2 attention behind.
    assert free["rows"][-1]["dot-product"] > free["certified"]
