"""Pictures of bounds over epochs, of certificates and of accuracies, without a display."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras_lipattn._figures import BLACK, FONT, GRAY, PALETTE, fit, label_ends, new_figure
from keras_lipattn._text import number, shorten

MOST_BARS = 30
_NO_BOUND = "no bound"
_WIDEST_NAME = 64
# Lines closer than this share of the height of the axes count as equal.
_EQUAL = 0.006

Bounds = Sequence[float]
# Name, part of the natural logarithm of the total, color, and text of a bar.
_Entry = tuple[str, float, str, str]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of a certificate.

    Attributes:
        name: Path of the call.
        kind: Class of its layer.
        constant: Its own constant, `inf` without a bound.
        cost: Its part of the natural logarithm of the total.
    """

    name: str
    kind: str
    constant: float
    cost: float


# Bounds over epochs -------------------------------------------------------------------------------


def bounds_figure(
    *,
    title: str,
    epochs: Sequence[int],
    total: Bounds,
    layers: Mapping[str, Bounds],
    running: Mapping[str, Bounds],
    lower: Mapping[str, Bounds],
    targets: Mapping[str, float],
    lower_total: Bounds | None = None,
) -> Any:
    """Bounds over epochs on logarithmic axes, 1200 by 750 pixels.

    The model has axes of its own: its bound is the product of many. Layers whose lines would hide
    each other share a line. As many groups of layers as there are colors are named, the largest
    at the end first; all others are gray.

    Args:
        title: Title of the picture.
        epochs: Numbers of the epochs.
        total: Certified bound of the model in each epoch.
        layers: From names to certified bounds in each epoch; so are `running` and `lower`, where
            names may be missing.
        running: Running bounds.
        lower: Measured lower bounds.
        targets: From names to targets.
        lower_total: Measured lower bounds of the model.
    """
    figure = new_figure(12.0, 7.5)
    ratios = (1.0, 1.8) if layers else (1.0,)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)
    drawings = [_Lines(axes, epochs) for axes in panels[:, 0]]
    model = drawings[0]
    model.line("total", total, BLACK)
    if lower_total is not None:
        model.line("lower", lower_total, BLACK, _LOWER)
    model.axes.set_ylabel("model")
    if layers:
        _draw_layers(drawings[1], layers, running, lower, targets)
        drawings[1].axes.set_ylabel("layers")
    for drawing in drawings:
        drawing.finish()
    drawings[-1].axes.set_xlabel("epoch")
    figure.text(0.01, 0.985, title, fontsize=13, va="top")
    styles = {label: style for drawing in drawings for label, style in drawing.styles.items()}
    handles = [_handle(label, style) for label, style in styles.items()]
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(0.995, 0.995),
        ncols=len(handles),
        frameon=False,
        fontsize=FONT,
    )
    fit(figure, panels[:, 0], top=0.93, gap=28.0)
    for drawing in drawings:
        drawing.label_ends()
    fit(figure, panels[:, 0], top=0.93, gap=28.0)
    return figure


_CERTIFIED = {"label": "certified", "linewidth": 2.0, "marker": "o", "markersize": 3.5}
_RUNNING = {"label": "running", "linewidth": 1.3, "linestyle": ":", "marker": "x", "markersize": 5}
_LOWER = {"label": "lower, measured", "linewidth": 1.0, "marker": "v", "markersize": 5}
_TARGET = {"label": "target", "linewidth": 1.3, "linestyle": "--"}
_INFINITE = {"label": "inf: no finite bound", "linestyle": "none", "marker": "^"}
_ZERO = {"label": "0", "linestyle": "none", "marker": "v"}


def _handle(label: str, style: Mapping) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=GRAY, **{**style, "label": label})


def _draw_layers(drawing, layers, running, lower, targets) -> None:
    positive = [
        value
        for values in [*layers.values(), *running.values(), *lower.values(), targets.values()]
        for value in values
        if 0.0 < value < math.inf
    ]
    # Axes show at least a factor of 2.
    span = max(
        math.log(max(positive)) - math.log(min(positive)) if positive else 0.0, math.log(2.0)
    )
    groups: list[list[str]] = []
    for name in layers:
        mine = [*layers[name], *running.get(name, ()), *lower.get(name, ())]
        for group in groups:
            first = group[0]
            theirs = [*layers[first], *running.get(first, ()), *lower.get(first, ())]
            if _close(mine, theirs, _EQUAL * span):
                group.append(name)
                break
        else:
            groups.append([name])
    by_end = sorted(groups, key=lambda group: -layers[group[0]][-1])
    # A gray line has no name, so a single one gets a color too.
    named = by_end[: len(PALETTE)]
    colors = {group[0]: PALETTE[place] for place, group in enumerate(named)}
    others = [group for group in groups if group[0] not in colors]
    for group in [*others, *named]:
        first = group[0]
        color = colors.get(first, GRAY)
        name = ", ".join(group)
        if len(name) > _WIDEST_NAME:
            equal = f" and {len(group) - 1} equal" if len(group) > 1 else ""
            name = shorten(first, _WIDEST_NAME) + equal
        drawing.line(name if first in colors else None, layers[first], color)
        for values, style in ((running, _RUNNING), (lower, _LOWER)):
            if first in values:
                drawing.line(None, values[first], color, style)
    if others:
        ends = sorted(layers[group[0]][-1] for group in others)
        count = sum(map(len, others))
        text = f"{count} more, {number(ends[0])} to {number(ends[-1])}"
        drawing.label(text, ends[len(ends) // 2], GRAY)
    values = sorted(set(targets.values()))
    for value in values:
        owners = {group[0] for group in groups for name in group if targets.get(name) == value}
        color = colors.get(min(owners), GRAY) if len(owners) == 1 else GRAY
        drawing.target(value, f"target {value:g}" if len(values) <= 4 else None, color)
    if len(values) > 4:
        drawing.label(f"targets {values[0]:g} to {values[-1]:g}", values[len(values) // 2], GRAY)


def _close(mine: Bounds, theirs: Bounds, tolerance: float) -> bool:
    """Whether two lines look the same on a logarithmic axis."""
    if len(mine) != len(theirs):
        return False
    return all(
        one == other
        or (0.0 < min(one, other) and abs(math.log(one) - math.log(other)) <= tolerance)
        for one, other in zip(mine, theirs, strict=True)
    )


class _Lines:
    """Lines over epochs on one pair of axes, and the labels at their ends."""

    def __init__(self, axes, epochs: Sequence[int]) -> None:
        self.axes = axes
        self.styles: dict[str, dict] = {}
        self._epochs = list(epochs)
        # Decimal logarithms, since axes of matplotlib with a logarithmic scale overflow.
        self._heights: list[float] = []
        self._ends: list[tuple[str, float, str]] = []

    def line(self, name: str | None, values: Bounds, color: str, style: Mapping = _CERTIFIED):
        style = dict(style)
        self.styles.setdefault(style["label"], style)
        faint = color == GRAY
        shown = [math.log10(value) if 0.0 < value < math.inf else math.nan for value in values]
        self._heights += [height for height in shown if not math.isnan(height)]
        style |= {
            "linewidth": style["linewidth"] * (0.5 if faint else 1.0),
            "label": "_" + style["label"],
        }
        # With markers, since a single point makes no line; not so many that they hide the line.
        every = max(1, len(self._epochs) // 25)
        self.axes.plot(self._epochs, shown, color=color, markevery=every, **style)
        for edge, place, extreme in ((math.inf, 1.0, _INFINITE), (0.0, 0.0, _ZERO)):
            at = [epoch for epoch, v in zip(self._epochs, values, strict=True) if v == edge]
            if at:
                self.styles[extreme["label"]] = extreme
                # Sized by line width, so that those of several lines stay visible.
                self.axes.plot(
                    at,
                    [place] * len(at),
                    transform=self.axes.get_xaxis_transform(),
                    color=color,
                    markersize=4.0 + 2.0 * style["linewidth"],
                    clip_on=False,
                    **extreme | {"label": "_edge"},
                )
        if name is not None:
            self.label(f"{name}  {number(values[-1])}", values[-1], color)

    def label(self, text: str, value: float, color: str) -> None:
        self._ends.append((text, value, color))

    def target(self, value: float, text: str | None, color: str) -> None:
        self.styles["target"] = _TARGET
        self._heights.append(math.log10(value))
        self.axes.axhline(math.log10(value), color=color, **_TARGET | {"label": "_target"})
        if text is not None:
            self.label(text, value, color)

    def finish(self) -> None:
        """Set the scale, once all lines are drawn."""
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

        low, high = min(self._heights, default=0.0), max(self._heights, default=0.0)
        # At least a factor of 2, so that rounding errors do not look like changes.
        margin = max(0.05 * (high - low), 0.5 * (math.log10(2.0) - (high - low)))
        low, high = low - margin, high + margin
        self.axes.set_ylim(low, high)
        self.axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: _power(height)))
        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        self.axes.margins(x=0.01)
        self.axes.grid(alpha=0.25)
        self.axes.spines[["top", "right"]].set_visible(False)

    def label_ends(self) -> None:
        low, high = self.axes.get_ylim()
        heights = [math.log10(value) if value > 0.0 else low for _, value, _ in self._ends]
        ends = [min(max((height - low) / (high - low), 0.0), 1.0) for height in heights]
        label_ends(self.axes, ends, [(text, color) for text, _, color in self._ends])


# Certificates -------------------------------------------------------------------------------------


def costs_figure(*, title: str, bars: Sequence[Bar]) -> Any:
    """The factor of each kind of layer and of each call in the total, the largest first.

    Args:
        title: Title of the picture.
        bars: Rows of a certificate.
    """
    kinds: dict[str, list[Bar]] = {}
    for bar in bars:
        kinds.setdefault(bar.kind, []).append(bar)
    sums = {kind: math.fsum(bar.cost for bar in members) for kind, members in kinds.items()}
    unbounded = {bar.kind for bar in bars if math.isinf(bar.constant)}
    ranked = sorted(kinds, key=lambda kind: (kind not in unbounded, -sums[kind], kind))
    # Colors for what changes the total the most.
    colored = sorted(kinds, key=lambda kind: (kind not in unbounded, -abs(sums[kind]), kind))
    telling = [kind for kind in colored if _tells(sums[kind]) or kind in unbounded] or colored
    colors = dict(zip(telling, PALETTE, strict=False))
    growth = math.fsum(cost for cost in sums.values() if cost > 0.0)

    # Without a bound of the total, the factors of the other rows in it are not known.
    is_known = not unbounded or any(bar.cost for bar in bars)
    factor = _factor if is_known else lambda cost: ""

    def text_of_kind(kind: str) -> str:
        calls = f"{len(kinds[kind])} call{'s' if len(kinds[kind]) > 1 else ''}"
        if kind in unbounded:
            return f"{_NO_BOUND}   {calls}"
        share = f", {100.0 * sums[kind] / growth:.0f} %" if sums[kind] > 0.005 * growth > 0 else ""
        return f"{factor(sums[kind])}{share}   {calls}"

    top = [(kind, sums[kind], colors.get(kind, GRAY), text_of_kind(kind)) for kind in ranked]
    order = sorted(bars, key=lambda bar: (math.isfinite(bar.constant), -bar.cost))
    # Calls with the factor 1 say little, unless there are no others.
    calls = [bar for bar in order if _tells(bar.cost) or math.isinf(bar.constant)] or order
    largest = sorted(calls, key=lambda bar: (math.isfinite(bar.constant), -abs(bar.cost)))
    shown = {id(bar) for bar in largest[:MOST_BARS]}
    rest = [bar for bar in order if id(bar) not in shown]
    bottom = [
        (
            shorten(bar.name, _WIDEST_NAME),
            bar.cost,
            colors.get(bar.kind, GRAY),
            _text_of_row(bar, factor),
        )
        for bar in order
        if id(bar) in shown
    ]
    if rest:
        cost = math.fsum(bar.cost for bar in rest)
        bottom.append((f"{len(rest)} more calls", cost, GRAY, factor(cost)))
    top = _with_rest(top, factor)
    lines = [len(top) + 1.5, len(bottom) + 1.5]
    figure = new_figure(11.0, 1.2 + 0.24 * sum(lines))
    panels = figure.subplots(2, 1, sharex=True, height_ratios=lines)
    for axes, entries, heading in zip(
        panels,
        (top, bottom),
        ("kinds of layers: factor in the total, share", "calls: factor in the total, own constant"),
        strict=True,
    ):
        _draw_bars(axes, entries, heading)
    figure.text(0.01, 1.0 - 0.12 / figure.get_figheight(), title, fontsize=12, va="top")
    fit(figure, panels, top=1.0 - 0.75 / figure.get_figheight(), gap=46.0)
    return figure


def _with_rest(entries: list[_Entry], factor: Callable[[float], str]) -> list[_Entry]:
    """The kinds that have a color, and all others in one entry."""
    rest = [entry for entry in entries if entry[2] == GRAY]
    if len(rest) < 2:
        return entries
    cost = math.fsum(entry[1] for entry in rest)
    other = (f"{len(rest)} other kinds", cost, GRAY, factor(cost))
    return [*(entry for entry in entries if entry[2] != GRAY), other]


def _text_of_row(bar: Bar, factor: Callable[[float], str]) -> str:
    if math.isinf(bar.constant):
        return _NO_BOUND
    return f"{factor(bar.cost)}   {number(bar.constant)}"


def _tells(cost: float) -> bool:
    """Whether a factor is not 1 as it is printed."""
    return _factor(cost) != "x1"


def _factor(cost: float) -> str:
    return f"x{_power(cost / math.log(10.0))}"


def _power(digits: float) -> str:
    """A power of ten, which a float64 may not hold."""
    is_round = abs(digits) >= 4.5 and abs(digits - round(digits)) < 1e-9
    return f"10^{digits:.0f}" if is_round or abs(digits) > 300.0 else number(10.0**digits)


def _draw_bars(axes, entries: Sequence[_Entry], heading: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    places = range(len(entries))
    costs = [cost / math.log(10.0) for _, cost, _, _ in entries]
    axes.barh(places, costs, color=[color for *_, color, _ in entries], height=0.72)
    axes.set_yticks(places, [name for name, *_ in entries], fontsize=FONT)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.axvline(0.0, color=BLACK, linewidth=0.8)
    for place, (_, _, color, text) in zip(places, entries, strict=True):
        across = axes.get_yaxis_transform()
        axes.text(1.01, place, text, va="center", fontsize=FONT, transform=across)
        if text.startswith(_NO_BOUND):
            # Across the whole width: no length would be long enough.
            edges = ([0.0, 1.0], [place - 0.36] * 2, [place + 0.36] * 2)
            style = {"facecolor": "none", "edgecolor": color, "hatch": "////", "linewidth": 0.0}
            axes.fill_between(*edges, transform=across, **style)
    low, high = axes.get_xlim()
    low, high = min(low, 0.0), max(high, 0.0, low + math.log10(2.0))
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _factor(value * math.log(10.0))))
    axes.set_title(heading, loc="left", fontsize=FONT + 1.0)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of round factors between two of them."""
    from matplotlib.ticker import MaxNLocator

    if high - low > 3.0:
        ticks = MaxNLocator(7, integer=True).tick_values(low, high)
    elif high - low > 1.0:
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [decade + math.log10(step) for decade in decades for step in (1, 2, 5)]
    else:
        factors = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(10.0**low, 10.0**high)
        ticks = [math.log10(factor) for factor in factors if factor > 0.0]
    return [float(tick) for tick in ticks if low <= tick <= high]


# Accuracies ---------------------------------------------------------------------------------------


def accuracy_figure(
    *,
    norm: str,
    end: float,
    certified: Callable[[float], float],
    clean: float,
    radii: Sequence[float],
    attacked: Sequence[float] | None,
) -> Any:
    """Certified accuracy over the radius, and the accuracy under attack.

    Args:
        norm: Name of the norm of the radii.
        end: Largest radius.
        certified: Function from a radius to the certified accuracy.
        clean: Accuracy without perturbation.
        radii: Radii of the table, in ascending order.
        attacked: Accuracy under attack at each of them, `None` without an attack.
    """
    figure = new_figure(8.5, 4.8)
    axes = figure.subplots()
    grid = [end * step / 400 for step in range(401)]
    curve = [certified(radius) for radius in grid]
    blue, orange = PALETTE[:2]
    axes.axhline(clean, color=GRAY, linewidth=1.2, linestyle="--")
    axes.fill_between(grid, 0.0, curve, color=blue, alpha=0.12, linewidth=0.0)
    axes.plot(grid, curve, color=blue, linewidth=2.0)
    axes.plot(
        radii, [certified(radius) for radius in radii], "o", color=blue, markersize=5, clip_on=False
    )
    ends = [clean, curve[-1]]
    labels = [(f"clean  {clean:.3f}", GRAY), ("certified", blue)]
    if attacked is not None:
        xs, ys = [0.0, *radii], [clean, *attacked]
        axes.plot(xs, ys, "s--", color=orange, linewidth=1.6, markersize=5, clip_on=False)
        ends.append(ys[-1])
        labels.append((f"under attack  {ys[-1]:.3f} at {xs[-1]:g}", orange))
    axes.set_xlim(0.0, end)
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel(f"radius ({norm})")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    fit(figure, [axes], top=0.96)
    label_ends(axes, ends, labels)
    fit(figure, [axes], top=0.96)
    return figure
