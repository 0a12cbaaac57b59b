"""Plot of bounds over epochs."""

import math
import os
from collections.abc import Mapping, Sequence

from keras_lipattn._whole_file import whole_file

Bounds = Sequence[float]

# More layers than this are colored by depth and only the first and last are named.
MOST_NAMED = 10


def plot_bounds(
    path: str | os.PathLike,
    *,
    title: str,
    epochs: Sequence[int],
    total: Bounds,
    layers: Mapping[str, Bounds],
    running: Mapping[str, Bounds],
    targets: Mapping[str, float],
) -> None:
    """Writes an image of bounds over epochs, 1200 by 750 pixels as a PNG.

    Args:
        path: Path of the image. Its suffix determines the format.
        title: Title of the plot.
        epochs: Numbers of the epochs.
        total: Certified bound of the model in each epoch.
        layers: Dictionary from names to certified bounds in each epoch.
        running: Dictionary from names to running bounds in each epoch. Names may be missing.
        targets: Dictionary from names to targets. Names may be missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            f"Plots need matplotlib: pip install 'keras-lipattn[examples]'. Received: {error}"
        ) from error
    figure = Figure(figsize=(12.0, 7.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    draw = _Drawing(axes, epochs)
    draw.line(total, "total", color="black", linewidth=2.5)
    many = len(layers) > MOST_NAMED
    palette = colormaps["viridis" if many else "tab10"]
    ends = (0, len(layers) - 1)
    for index, (name, values) in enumerate(layers.items()):
        color = palette(index / (len(layers) - 1) if many else index)
        label = name if not many or index in ends else None
        draw.line(values, label, color=color, linewidth=1.5)
        if name in running:
            draw.line(running[name], None, color=color, linewidth=1.2, linestyle=":", marker="x")
    for value, names in _by_value(targets).items():
        common = len(names) > 1 or many
        color = "gray" if common else palette(list(layers).index(names[0]))
        draw.target(value, f"target {value:g}", color)
    if running:
        axes.plot([], [], color="gray", linewidth=1.2, linestyle=":", marker="x", label="running")
    draw.scale()
    # Leaves room for the triangles at the upper edge.
    axes.set_title(title, pad=14.0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("bound of the Lipschitz constant")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    with whole_file(path) as file:
        figure.savefig(file)


class _Drawing:
    """Lines on axes, and the values drawn so far, which determine the scale."""

    def __init__(self, axes, epochs: Sequence[int]) -> None:
        self._axes = axes
        self._epochs = list(epochs)
        self._finite: list[float] = []
        self._infinite = False

    def line(
        self,
        values: Bounds,
        label: str | None,
        *,
        color,
        linewidth: float,
        linestyle: str = "-",
        marker: str = "o",
    ) -> None:
        finite = [value if math.isfinite(value) else math.nan for value in values]
        self._finite += [value for value in finite if not math.isnan(value)]
        # With markers, since a single point makes no line.
        self._axes.plot(
            self._epochs,
            finite,
            label=label,
            color=color,
            linewidth=linewidth,
            linestyle=linestyle,
            marker=marker,
            markersize=3.5,
        )
        above = [epoch for epoch, v in zip(self._epochs, values, strict=True) if math.isinf(v)]
        if above:
            self._infinite = True
            # At the upper edge for any scale. Sized by line width, so the total stays visible.
            self._axes.plot(
                above,
                [1.0] * len(above),
                transform=self._axes.get_xaxis_transform(),
                linestyle="none",
                marker="^",
                markersize=4.0 + 3.0 * linewidth,
                color=color,
                clip_on=False,
            )

    def target(self, value: float, label: str, color) -> None:
        self._finite.append(value)
        self._axes.axhline(value, label=label, color=color, linewidth=1.2, linestyle="--")

    def scale(self) -> None:
        positive = [value for value in self._finite if value > 0.0]
        if positive and max(positive) >= 30.0 * min(positive):
            self._axes.set_yscale("log", nonpositive="mask")
        else:
            self._axes.set_ylim(bottom=0.0)
        if self._infinite:
            self._axes.plot(
                [], [], linestyle="none", marker="^", color="gray", label="inf: no finite bound"
            )


def _by_value(targets: Mapping[str, float]) -> dict[float, list[str]]:
    groups: dict[float, list[str]] = {}
    for name, value in targets.items():
        groups.setdefault(value, []).append(name)
    return groups
