"""The table of everything that `certify` has a rule for, as Markdown for the site.

Every case of the attack on the rules is built with random weights in a model of its own, and
certified in each norm. `make docs` puts the table into docs/layer_table.md.
"""

import math
from collections.abc import Callable, Iterator

import keras
import numpy as np

from keras_lipattn.certification import Certificate, certify
from tools.soundness.rules.cases import RuleCase, all_cases
from tools.soundness.rules.subjects import plain_model, randomize

NORMS = {"l2": "2-norm", "token": "token norm", "linf": "max norm"}
# What a finite constant may need, as options of `certify`.
_NEEDS = {
    "": {},
    "fixed mask": {"assume_fixed_mask": True},
    "bounded tokens": {"input_radius": 1.0},
    "bounded tokens, fixed mask": {"input_radius": 1.0, "assume_fixed_mask": True},
}
_HEADER = ("", *NORMS.values(), "needs", "rule")
_SECTIONS = ("Layers of Keras", "Layers of this package", "Operations of `keras.ops`")


def page(link: Callable[[str], str] = str) -> str:
    """Three tables in Markdown.

    Args:
        link: puts links into the names of theorems.
    """
    tables: dict[str, list[tuple[str, ...]]] = {title: [] for title in _SECTIONS}
    for case in _one_case_each():
        tables[_section(case)].append(_row(case, link))
    text = []
    for title, rows in tables.items():
        text += [f"## {title}", "", _line(_HEADER), _line(["---"] * len(_HEADER))]
        text += [*(_line(row) for row in sorted(rows)), ""]
    return "\n".join(text)


def _one_case_each() -> Iterator[RuleCase]:
    seen = set()
    for case in all_cases():
        if case.target not in seen:
            seen.add(case.target)
            yield case


def _section(case: RuleCase) -> str:
    if not isinstance(case.target, type):
        return _SECTIONS[2]
    return _SECTIONS[0 if case.target.__module__.startswith("keras.") else 1]


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _row(case: RuleCase, link: Callable[[str], str]) -> tuple[str, ...]:
    name = case.name.removeprefix("ops:")
    needs, found = _certificates([_model(case, seed) for seed in (0, 1)])
    numbers = [_number([one[norm] for one in found]) for norm in NORMS]
    rules = dict.fromkeys(_rule(one) for one in found[0].values())
    return (f"`{name}`", *numbers, needs, link("; ".join(rules)).replace("|", r"\|"))


def _certificates(models) -> tuple[str, list[dict[str, Certificate]]]:
    """Certificates of each model by norm, finite if possible, and what they need for it."""
    first = None
    for needs, options in _NEEDS.items():
        found = [{norm: certify(model, norm, **options) for norm in NORMS} for model in models]
        if any(one.is_finite for one in found[0].values()):
            return needs, found
        first = first or found
    return "", first or []


def _model(case: RuleCase, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = plain_model(case)
    randomize(model, np.random.default_rng(seed))
    return model


def _number(certificates: list[Certificate]) -> str:
    totals = [certificate.total for certificate in certificates]
    if math.isinf(totals[0]):
        return "none"
    same = math.isclose(*totals, rel_tol=1e-6)
    text = f"{totals[0]:.4g}" if same else "weights"
    return f"= {text}" if all(row.exact for row in certificates[0].rows) else text


def _rule(certificate: Certificate) -> str:
    if not certificate.is_finite:
        return next((row.reason for row in certificate.rows if row.reason), "")
    return ", ".join(dict.fromkeys(row.theorem for row in certificate.rows if row.theorem))
