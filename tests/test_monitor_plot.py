"""The plot of bounds over epochs."""

import builtins
import math
import struct

import pytest
from helpers.monitor_models import KINDS, compiled, fit

from keras_lipattn.callbacks import LipschitzMonitor
from keras_lipattn.callbacks._plot import MOST_NAMED, plot_bounds


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_plot_of_a_fit_is_a_png_of_the_stated_size(tmp_path):
    model = compiled(KINDS["sequential"]())
    monitor = LipschitzMonitor(penalty=0.1, target={"head": 0.5}, running_freq=1)
    fit(model, monitor, epochs=2)
    monitor.plot(tmp_path / "bounds.png")
    assert png_size(tmp_path / "bounds.png") == (1200, 750)


@pytest.mark.parametrize(
    "total",
    [[1.0], [1.0, 2.0], [1e-3, 1e6], [math.inf, 3.0], [math.inf, math.inf], [0.0, 0.0]],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 3, MOST_NAMED + 1])
def test_all_histories_of_bounds_can_be_plotted(tmp_path, total, count):
    layers = {f"layer_{index}": [value / 2 for value in total] for index in range(count)}
    plot_bounds(
        tmp_path / "bounds.png",
        title="title",
        epochs=range(3, 3 + len(total)),
        total=total,
        layers=layers,
        running=layers if count == 3 else {},
        targets=dict.fromkeys(layers, 2.0),
    )
    assert png_size(tmp_path / "bounds.png") == (1200, 750)


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"before the first epoch.*Received: path="):
        LipschitzMonitor().plot(tmp_path / "bounds.png")


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"keras-lipattn\[examples\].*Received: No module"):
        plot_bounds(
            tmp_path / "x.png", title="", epochs=[1], total=[1.0], layers={}, running={}, targets={}
        )
