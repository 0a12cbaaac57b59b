"""The page that says what became of the models."""

import math

from tools.gallery.trial import STEPS, Trial

_NAMES = {"as_written": "as written", "edited": "edited"}
_HEAD = """# Gallery

Models in the style of the public Keras examples, in [examples/gallery](../examples/gallery), each
in two versions:

- *as written*: `L2MultiHeadAttention(..., lipschitz_bound=1.0)` stands where
  `keras.layers.MultiHeadAttention` stood for self-attention. Cross-attention stays as it was.
- *edited*: after the edits that its certificate proposes. *Edited lines* counts the lines that
  differ from the version as written.

Each is built, fitted for two steps with a `LipschitzMonitor` that penalizes, saved as `.keras`,
loaded again (the difference is the largest one of an output, relative to the largest output),
certified in the 2-norm and exported as a SavedModel. A certified total above 1000 is vacuous and
stands here as a power of ten. An export without a finite total is refused. What failed, and why,
stands below the table. `make gallery` writes this page.
"""


def page(trials: list[Trial], machine: str) -> str:
    """The page in Markdown."""
    parts = [_HEAD, _table(trials), f"Measured on {machine}.\n"]
    notes = [note for trial in trials for note in _notes(trial)]
    if notes:
        parts.append("## Failures, refusals and reasons\n\n" + "\n".join(notes) + "\n")
    return "\n".join(parts)


def _table(trials: list[Trial]) -> str:
    rows = [
        [
            "model",
            "version",
            "weights",
            "built",
            "fitted",
            "saved",
            "reloaded (difference)",
            "certified total",
            "exported",
            "edited lines",
            "seconds",
        ]
    ]
    rows += [_row(trial) for trial in trials]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _row(trial: Trial) -> list[str]:
    name = trial.example.replace("_", " ")
    edited = "" if trial.version == "as_written" else str(trial.edited_lines)
    if trial.skipped:
        return [name, _NAMES[trial.version], "", *["skipped"] * len(STEPS), edited, ""]
    outcomes = {step: _outcome(trial, step) for step in STEPS}
    if "reloaded" in trial.done:
        outcomes["reloaded"] = f"yes ({trial.difference:.0e})"
    if "certified" in trial.done:
        outcomes["certified"] = total(trial)
    return [
        name,
        _NAMES[trial.version],
        str(trial.weights) if trial.weights else "",
        *outcomes.values(),
        edited,
        f"{trial.seconds:.0f}",
    ]


def _outcome(trial: Trial, step: str) -> str:
    if step in trial.done:
        return "yes"
    if step not in trial.failures:
        return "not reached"
    return "refused" if _is_refusal(trial.failures[step]) else "**failed**"


def total(trial: Trial) -> str:
    """The certified total as a number, as a power of ten where it is vacuous, or `inf`."""
    if math.isinf(trial.log10):
        return "inf"
    return f"{trial.total:.3g}" if trial.log10 < 3.0 else f"10^{trial.log10:.1f}"


def _is_refusal(line: str) -> bool:
    return line.startswith("ExportError:")


def _notes(trial: Trial) -> list[str]:
    where = f"{trial.example.replace('_', ' ')}, {_NAMES[trial.version]}"
    if trial.skipped:
        return [f"- {where}, skipped: {trial.skipped}"]
    notes = []
    for step, line in trial.failures.items():
        if _is_refusal(line) and trial.reason:
            # The note below tells the reason that follows.
            line = line.partition(" Received:")[0]
        notes.append(f"- {where}, {step}: {line}")
    if trial.reload_note and trial.difference > 1e-6:
        notes.append(f"- {where}, reloaded: {trial.reload_note}")
    if trial.reason:
        notes.append(f"- {where}, why the total is `inf`: {trial.reason}")
    return notes
