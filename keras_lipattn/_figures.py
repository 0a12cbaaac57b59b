"""Figures of matplotlib without a display: colors, margins, and labels that do not overlap."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from keras_lipattn._whole_file import whole_file

# Of Okabe and Ito, "Color universal design", 2008, without yellow, which is faint on white. The
# color-blind can tell them apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BLACK, GRAY = "#222222", "#6C6C6C"
FONT = 9.0
_DPI = 100
# Distance of two lines of text in pixels.
_LINE = 15.0


def new_figure(width: float, height: float) -> Any:
    """A figure of some inches; 100 pixels are an inch."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Plots need matplotlib: pip install 'keras-lipattn[examples]'. Received: {error}"
        ) from error
    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def fit(figure, panels, *, top: float, gap: float = 0.0) -> None:
    """Make room for the texts to the left and to the right of axes, and below the last one.

    Args:
        figure: A figure.
        panels: Its axes, in one column.
        top: Height of their upper edge, as a share of that of the figure.
        gap: Distance of two panels in pixels.
    """
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    left, right, bottom = 0.0, 0.0, 0.0
    for axes in panels:
        box, tight = axes.get_window_extent(renderer), axes.get_tightbbox(renderer)
        left = max(left, box.x0 - tight.x0)
        right = max(right, tight.x1 - box.x1)
        bottom = box.y0 - tight.y0
    count = len(panels)
    mean = (top * height - bottom - 10.0 - (count - 1) * gap) / count
    figure.subplots_adjust(
        left=(left + 12.0) / width,
        # Axes keep a third of the width, whatever the names are.
        right=max(1.0 - (right + 12.0) / width, (left + 12.0) / width + 1.0 / 3.0),
        bottom=(bottom + 10.0) / height,
        top=top,
        hspace=gap / mean,
    )


def save(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure. An old file stays if the new one cannot be written."""
    with whole_file(path) as file:
        figure.savefig(file)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The closest positions, in least squares, that keep a gap and the order.

    Args:
        positions: Wanted positions.
        gap: Smallest distance of two positions.
        low: Lower limit; it wins where there is too little room.
        high: Upper limit.

    Returns:
        A list in the order of `positions`.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    # With the gaps taken out this is isotonic regression: pool neighbors that are out of order.
    pools: list[list[float]] = []
    for place, index in enumerate(order):
        pools.append([positions[index] - place * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, count), (other, more) = pools.pop(), pools.pop()
            pools.append([(mean * count + other * more) / (count + more), count + more])
    means = [mean for mean, count in pools for _ in range(int(count))]
    highest = high - (len(order) - 1) * gap
    found = [0.0] * len(order)
    for place, (index, mean) in enumerate(zip(order, means, strict=True)):
        found[index] = max(low, min(mean, highest)) + place * gap
    return found


def label_ends(axes, ends: Sequence[float], labels: Iterable[tuple[str, str]]) -> None:
    """Write labels to the right of axes without overlap, joined to heights between 0 and 1."""
    gap = _LINE / (axes.get_window_extent().height)
    for end, place, (text, color) in zip(ends, spread(ends, gap, 0.0, 1.0), labels, strict=True):
        axes.annotate(
            text,
            xy=(1.0, end),
            xytext=(1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            fontsize=FONT,
            va="center",
            annotation_clip=False,
            # From the middle of the left edge of the text.
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0.0, 0.5),
            },
        )
