"""A certificate as a table and as a chart."""

import math
from typing import TYPE_CHECKING, Any

from keras_lipattn._plots import Bar, costs_figure
from keras_lipattn._text import number, shorten
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
                shorten(row.path, _WIDEST_PATH),
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


def figure(certificate: "Certificate") -> Any:
    """The certificate as a bar chart."""
    bars = [
        Bar(row.path, row.layer, row.constant, row.cost if row.is_finite else 0.0)
        for row in certificate.rows
    ]
    total = number(certificate.total)
    bound = f"Lipschitz constant <= {total}" if certificate.is_finite else "no Lipschitz bound"
    title = f"{certificate.model}: {bound} ({NORMS[certificate.norm]})"
    return costs_figure(title=title, bars=bars)
