"""A certificate as a table and as a chart."""

import math
import os
from typing import TYPE_CHECKING

from keras_lipattn._whole_file import whole_file
from keras_lipattn.bounds.lipschitz_bound import NORMS

if TYPE_CHECKING:
    from keras_lipattn.certification.certificate import Certificate

_WIDEST_PATH = 44
_COLUMNS = (
    "columns:",
    "  constant: Lipschitz constant of the call alone; = marks constants that are attained",
    "  published: the constant by the earlier published bound, where it differs",
    "  token radius: radius of a ball that holds the tokens of its input, where it is known",
    "  factor: factor of the call in the total; branches of a sum are weighted by their shares",
    "  because: where the constant comes from",
)


def table(certificate: "Certificate") -> str:
    """The certificate as a table for a terminal."""
    header = ("layer", "class", "constant", "published", "token radius", "factor", "because")
    lines: list[tuple[str, ...]] = [header]
    for row in certificate.rows:
        lines.append(
            (
                _shorten(row.path),
                row.layer,
                ("" if not row.exact else "=") + number(row.constant),
                number(row.published) if row.published != row.constant else "",
                number(row.radius) if math.isfinite(row.radius) else "",
                _factor(row.cost) if row.is_finite else "",
                "no bound, see below" if not row.is_finite else row.theorem,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    text.insert(1, "-" * max(len(line) for line in text))
    total = f"Lipschitz constant of {certificate.model!r} ({NORMS[certificate.norm]}): "
    total += f"<= {number(certificate.total)}" if certificate.is_finite else "no bound"
    if math.isfinite(certificate.log10):
        total += f" (log10 {certificate.log10:.2f})"
    text += ["", total]
    if certificate.published_total != certificate.total:
        published = number(certificate.published_total)
        text.append(f"with the published bounds of attention: {published}")
    if certificate.vacuous:
        text.append(certificate.vacuous)
    text += [f"  {reason}" for reason in certificate.reasons]
    if certificate.proposals:
        text += ["what to change:", *(f"  {line}" for line in certificate.proposals)]
    text += ["holds for:", *(f"  {line}" for line in str(certificate.threat_model).splitlines())]
    return "\n".join([*text, *_COLUMNS])


def _factor(cost: float) -> str:
    """The factor of a row in the total, from its part of the natural logarithm."""
    if abs(cost) > 700.0:
        # Beyond what a float64 holds.
        return f"x10^{cost / math.log(10.0):.0f}"
    return f"x{number(math.exp(cost))}"


def plot(certificate: "Certificate", path: str | os.PathLike) -> None:
    """Saves a bar chart of the cost of each row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plotting needs matplotlib: install it, for instance with "
            f"`pip install keras-lipattn[examples]`. Received: {error}"
        ) from error
    rows = [row for row in certificate.rows if row.cost or not row.is_finite] or [*certificate.rows]
    figure = Figure(figsize=(9.0, 1.6 + 0.28 * max(len(rows), 1)), layout="constrained")
    axes = figure.subplots()
    costs = [row.cost / math.log(10.0) if row.is_finite else 0.0 for row in rows]
    colors = ["tab:blue" if row.is_finite else "tab:red" for row in rows]
    axes.barh(range(len(rows)), costs, color=colors)
    for position, row in enumerate(rows):
        text = f" {number(row.constant)}" if row.is_finite else " no bound"
        axes.text(max(costs[position], 0.0), position, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [_shorten(row.path) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel("part of the layer in log10 of the total (label: its own constant)")
    axes.set_title(
        f"{certificate.model}: Lipschitz constant {number(certificate.total)} "
        f"({NORMS[certificate.norm]})"
    )
    with whole_file(path) as file:
        figure.savefig(file)


def number(value: float) -> str:
    """A number with four digits."""
    if math.isinf(value):
        return "inf"
    return f"{value:.4g}" if 1e-3 <= value < 1e5 or value == 0.0 else f"{value:.2e}"


def _shorten(path: str) -> str:
    return path if len(path) <= _WIDEST_PATH else "..." + path[3 - _WIDEST_PATH :]
