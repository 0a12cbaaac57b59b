"""Pictures: bounds over epochs, certificates and accuracies."""

import builtins
import itertools
import math
import os
import re
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers import documents
from helpers.monitor_models import KINDS, compiled, fit

from keras_lipattn._figures import BLACK, GRAY, PALETTE, save, spread
from keras_lipattn._plots import MOST_BARS, Bar, accuracy_figure, bounds_figure, costs_figure
from keras_lipattn.callbacks import LipschitzMonitor, lipschitz_monitor

colors_module = pytest.importorskip("matplotlib.colors")
text_module = pytest.importorskip("matplotlib.text")
LONG = "encoder/transformer_block_{}/multi_head_attention/output_projection"


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


# Colors -------------------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color, matrix):
    rgb = np.array(colors_module.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(matrix) @ linear, 0.0, 1.0)
    x, y, z = np.cbrt(np.maximum(XYZ @ seen / XYZ.sum(axis=1), 1e-6))
    return np.array([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colors_differ_for_the_color_blind(vision):
    # A difference of 2 is just visible in large patches; lines need several times that.
    for one, other in itertools.combinations([*PALETTE, BLACK, GRAY, "white"], 2):
        difference = np.linalg.norm(lab(one, VISION[vision]) - lab(other, VISION[vision]))
        assert difference > 10.0, (one, other)


# Labels -------------------------------------------------------------------------------------------


def boxes(figure):
    renderer = figure.canvas.get_renderer()
    texts = [*figure.texts]
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        texts += [*axes.texts, *(label for place, label in ticks if low <= place <= high)]
    for legend in figure.legends:
        texts += legend.get_texts()
    # The box of an annotation would include its line.
    extent = text_module.Text.get_window_extent
    return {
        (index, text.get_text()): extent(text, renderer)
        for index, text in enumerate(texts)
        if text.get_text() and text.get_visible()
    }


def check_that_nothing_overlaps(figure):
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    found = boxes(figure)
    for (_, text), box in found.items():
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
    for (one, box), (other, second) in itertools.combinations(found.items(), 2):
        apart = (
            box.x1 <= second.x0 or second.x1 <= box.x0 or box.y1 <= second.y0 or second.y1 <= box.y0
        )
        assert apart, (one, other)


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_gap_and_limits_and_moves_as_little_as_needed(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.choice([0.0, 0.5, 1.0], 8) + rng.normal(0.0, 0.02 * (seed % 3), 8)
    found = np.array(spread(wanted.tolist(), 0.05, 0.0, 1.0))
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(found[order]) >= 0.05 - 1e-12).all()
    assert found.min() >= 0.0 and found.max() <= 1.0 + 1e-12
    alone = [0.1, 0.4, 0.9]
    assert spread(alone, 0.05, 0.0, 1.0) == pytest.approx(alone)


# Bounds over epochs -------------------------------------------------------------------------------

TOTALS = [[1.0], [1.0, 2.0], [1e-3, 1e6], [math.inf, 3.0], [math.inf, math.inf], [0.0, 0.0]]
TOTALS += [[1.0 + 1e-9, 1.0], [1e150, 1e300]]


def histories(total, count, *, shared) -> dict[str, Any]:
    """Arguments of `bounds_figure` for many layers, with equal or different bounds."""
    scale = [1.0 if shared else 1.0 + 0.3 * index for index in range(count)]
    layers = {
        LONG.format(index): [value / 2.0 * factor for value in total]
        for index, factor in enumerate(scale)
    }
    return {
        "title": "Certified Lipschitz bounds, 2-norm of all entries",
        "epochs": range(3, 3 + len(total)),
        "total": total,
        "lower_total": [0.4 * value for value in total],
        "layers": layers,
        "running": layers if count == 3 else {},
        "lower": {name: [0.5 * value for value in values] for name, values in layers.items()},
        "targets": {name: 1.0 + index % 7 for index, name in enumerate(layers)},
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 72])
@pytest.mark.parametrize("total", TOTALS, ids=str)
def test_all_histories_of_bounds_can_be_read(tmp_path, total, count, shared):
    figure = bounds_figure(**histories(total, count, shared=shared))
    check_that_nothing_overlaps(figure)
    save(figure, tmp_path / "bounds.png")
    assert png_size(tmp_path / "bounds.png") == (1200, 750)


def curves(axes, *, prefix="_certified"):
    return [line for line in axes.get_lines() if line.get_label() == prefix]


def test_every_bound_is_drawn_on_a_logarithmic_scale():
    arguments = histories([1e-3, 7.0, 1e6], 3, shared=False)
    figure = bounds_figure(**arguments)
    panels = ([arguments["total"]], arguments["layers"].values())
    for axes, series in zip(figure.axes, panels, strict=True):
        low, high = axes.get_ylim()
        drawn = np.array([line.get_ydata() for line in curves(axes)])
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(np.log10([*series]), axis=0))
        for line in axes.get_lines():
            assert (np.asarray(line.get_ydata()) > low).all()
            assert (np.asarray(line.get_ydata()) < high).all()
        # The labels of the ticks are the numbers.
        for height, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
            text = re.sub(r"^10\^", "1e", label.get_text())
            assert float(text) == pytest.approx(10.0**height, rel=1e-3)


def test_equal_layers_share_a_line_and_different_ones_do_not():
    for shared in (False, True):
        arguments = histories([1.0, 2.0, 3.0], 6, shared=shared)
        arguments["targets"] = {}
        model, layers = bounds_figure(**arguments).axes
        assert len(curves(layers)) == (1 if shared else 6)
        assert len(curves(layers, prefix="_lower, measured")) == (1 if shared else 6)
        assert len(curves(model)) == len(curves(model, prefix="_lower, measured")) == 1
        named = [text.get_text() for text in layers.texts]
        assert any("and 5 equal" in text for text in named) == shared


def test_the_largest_layers_are_named_in_the_color_of_their_line():
    arguments = histories([1.0, 2.0], 20, shared=False)
    arguments["targets"] = {}
    _, layers = bounds_figure(**arguments).axes
    colors = {line.get_color(): line.get_ydata()[-1] for line in curves(layers)}
    assert set(colors) == {*PALETTE, GRAY}
    labels = {text.get_color(): text.get_text() for text in layers.texts}
    assert labels[GRAY].startswith("14 more")
    ends = sorted((values[-1] for values in arguments["layers"].values()), reverse=True)
    for color, end in zip(PALETTE, ends, strict=False):
        assert colors[color] == pytest.approx(math.log10(end)) and labels[color].endswith(
            f"  {end:.4g}"
        )


def test_infinite_bounds_and_zeros_are_marks_at_the_edges():
    arguments = histories([math.inf, 2.0, 0.0], 0, shared=False)
    arguments["lower_total"] = None
    figure = bounds_figure(**arguments)
    (axes,) = figure.axes
    edges = {line.get_marker(): line for line in axes.get_lines() if line.get_label() == "_edge"}
    assert [*edges["^"].get_xdata()] == [3] and [*edges["^"].get_ydata()] == [1.0]
    assert [*edges["v"].get_xdata()] == [5] and [*edges["v"].get_ydata()] == [0.0]
    explained = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "inf: no finite bound" in explained and "0" in explained


def test_plot_of_a_fit_shows_targets_running_and_lower_bounds(monkeypatch):
    model = compiled(KINDS["sequential"]())
    x = np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype("float32")
    monitor = LipschitzMonitor(
        penalty=0.1, target={"head": 0.5}, running_freq=1, lower_bound_data=x
    )
    fit(model, monitor, epochs=2)
    drawn = {}
    monkeypatch.setattr(lipschitz_monitor, "bounds_figure", lambda **kwargs: drawn.update(kwargs))
    monkeypatch.setattr(lipschitz_monitor, "save", lambda figure, path: None)
    monitor.plot("bounds.png")
    assert drawn["epochs"] == [1, 2] and drawn["targets"] == {"head": 0.5}
    for name, key in (("layers", "lipschitz"), ("running", "running"), ("lower", "lower")):
        assert drawn[name]["head"] == monitor.history[f"{key}_head"]
        assert all(len(values) == 2 for values in drawn[name].values())
    assert drawn["lower_total"] == monitor.history["lower_total"]
    assert all(lower > 0.0 for lower in drawn["lower_total"])


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"before the first epoch.*Received: path="):
        LipschitzMonitor().plot(tmp_path / "bounds.png")


# Certificates -------------------------------------------------------------------------------------


def bars(count, *, seed=0, infinite=()):
    rng = np.random.default_rng(seed)
    kinds = ["Dense", "L2MultiHeadAttention", "LayerNormalization", "Residual", "Add", "Conv2D"]
    kinds += ["Flatten", "Reshape", "GlobalAveragePooling1D"]
    return [
        Bar(
            LONG.format(index),
            kinds[index % len(kinds)],
            math.inf if index in infinite else math.exp(cost),
            0.0 if index in infinite else cost,
        )
        for index, cost in enumerate(rng.normal(0.5, 1.5, count))
    ]


def drawn(axes):
    """Widths, colors, names and texts of the bars, from the top."""
    patches = axes.patches
    names = [label.get_text() for label in axes.get_yticklabels()]
    texts = [text.get_text() for text in axes.texts]
    assert len(patches) == len(names) == len(texts)
    return [
        (patch.get_width(), patch.get_facecolor()[:3], name, text)
        for patch, name, text in zip(patches, names, texts, strict=True)
    ]


@pytest.mark.parametrize("infinite", [(), (3, 7)])
@pytest.mark.parametrize("count", [1, 9, 40, 300])
def test_bars_are_sorted_and_sum_to_the_total(count, infinite):
    rows = bars(count, infinite=infinite)
    figure = costs_figure(title="model: Lipschitz constant <= 5", bars=rows)
    check_that_nothing_overlaps(figure)
    total = sum(bar.cost for bar in rows) / math.log(10.0)
    for axes in figure.axes:
        entries = drawn(axes)
        assert sum(width for width, *_ in entries) == pytest.approx(total)
        summed = [entry for entry in entries if re.match(r"\d+ (more|other)", entry[2])]
        assert len(summed) <= 1 and [*entries[len(entries) - len(summed) :]] == summed
        bounded = [
            entry for entry in entries[: len(entries) - len(summed)] if "no bound" not in entry[3]
        ]
        widths = [width for width, *_ in bounded]
        assert widths == sorted(widths, reverse=True)
    assert len(drawn(figure.axes[1])) == min(count, MOST_BARS + 1)
    unbounded = [entry for entry in drawn(figure.axes[1]) if "no bound" in entry[3]]
    assert len(unbounded) == sum(index < count for index in infinite)


def test_shares_of_the_kinds_are_those_of_the_growth():
    rows = [Bar("a", "Dense", 8.0, 3.0), Bar("b", "Dense", 1.0, 0.0), Bar("c", "Add", 2.0, 1.0)]
    rows += [Bar("d", "Residual", 0.5, -0.7), Bar("e", "Flatten", 1.0, 0.0)]
    kinds, _ = costs_figure(title="", bars=rows).axes
    texts = {name: text for _, _, name, text in drawn(kinds)}
    assert "75 %" in texts["Dense"] and "25 %" in texts["Add"] and "2 calls" in texts["Dense"]
    assert "%" not in texts["Residual"] + texts["Flatten"]


def test_without_a_bound_no_other_factor_is_stated():
    rows = [Bar("a", "Attention", math.inf, 0.0), Bar("b", "Dense", 2.0, 0.0)]
    for axes in costs_figure(title="", bars=rows).axes:
        texts = [text for *_, text in drawn(axes)]
        assert texts[0].startswith("no bound") and not any("x1" in text for text in texts)


def test_a_call_has_the_color_of_its_kind():
    kinds, calls = costs_figure(title="", bars=bars(18)).axes
    colors = {name: color for _, color, name, _ in drawn(kinds)}
    assert len(set(colors.values())) == len(PALETTE) + 1
    indices = [re.findall(r"block_(\d+)", name) for _, _, name, _ in drawn(calls)]
    assert len(indices) == 18
    for (index,), (_, color, _, _) in zip(indices, drawn(calls), strict=True):
        kind = bars(18)[int(index)].kind
        assert color == colors.get(kind, color)


# Accuracies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attacked", [None, [0.9, 0.6, 0.0], [0.9, 0.9, 0.9]])
def test_the_accuracy_curve_shows_what_is_certified(attacked):
    figure = accuracy_figure(
        norm="2-norm",
        end=1.0,
        certified=lambda radius: 0.9 if radius == 0.0 else max(0.0, 0.8 - radius),
        clean=0.9,
        radii=[0.1, 0.3, 0.9],
        attacked=attacked,
    )
    check_that_nothing_overlaps(figure)
    (axes,) = figure.axes
    lines = {(line.get_color(), len(line.get_xdata())): line for line in axes.get_lines()}
    curve = lines[PALETTE[0], 401]
    np.testing.assert_allclose(curve.get_ydata()[1:], np.maximum(0.0, 0.8 - curve.get_xdata()[1:]))
    assert ((PALETTE[1], 4) in lines) == (attacked is not None)
    if attacked is not None:
        assert [*lines[PALETTE[1], 4].get_ydata()] == [0.9, *attacked]


# Without a display, and without matplotlib --------------------------------------------------------


def test_pictures_need_no_display(tmp_path):
    program = """
from keras_lipattn._figures import save
from keras_lipattn._plots import Bar, costs_figure
save(costs_figure(title="", bars=[Bar("a", "Dense", 2.0, 0.7)]), "costs.png")
"""
    environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
    environment |= {"MPLBACKEND": "tkagg", "PYTHONPATH": str(documents.ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"keras-lipattn\[examples\].*Received: No module"):
        costs_figure(title="", bars=bars(2))
