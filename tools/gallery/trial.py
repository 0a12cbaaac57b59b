"""One version of one model, taken through everything a user does with it."""

import contextlib
import dataclasses
import difflib
import math
import pathlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from examples.gallery import Example
from keras_lipattn import LipschitzMonitor, certify, export_saved_model

STEPS = ("built", "fitted", "saved", "reloaded", "certified", "exported")
# The bold type of messages of Keras.
_COLORS = re.compile(r"\x1b\[\d+m")
_LONGEST = 400
# Caps shrink by up to a thousandth more where a layer does not remember the norms of its weights.
_CLOSE = 1e-3
# Two steps of the optimizer in one epoch.
_FIT = dict(batch_size=4, epochs=1, verbose=0)


@dataclasses.dataclass(kw_only=True)
class Trial:
    """What became of one version of one model.

    Attributes:
        example: Name of the model.
        version: `"as_written"` or `"edited"`.
        edited_lines: Lines that were changed, added or removed since `"as_written"`.
        weights: Number of its weights.
        failures: From each step that raised to the first line of the exception. A step after a
            failed one which it needs is neither here nor in `done`.
        done: The steps that succeeded.
        difference: Largest difference of the outputs after reloading, relative to the largest
            output.
        total: Certified constant, `inf` where there is none.
        log10: Its decimal logarithm.
        reason: The first reason why the constant is `inf`.
        seconds: Wall time of all steps.
        skipped: Why nothing was run, empty if something was.
        reload_note: Why the outputs differ after reloading, empty if not known.
    """

    example: str
    version: str
    edited_lines: int = 0
    weights: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    done: list[str] = dataclasses.field(default_factory=list)
    difference: float = math.nan
    total: float = math.inf
    log10: float = math.inf
    reason: str = ""
    seconds: float = 0.0
    skipped: str = ""
    reload_note: str = ""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Records whether the step succeeds; whatever it raises ends here."""
        try:
            yield
        except Exception as error:
            self.failures[name] = first_line(error)
        else:
            self.done.append(name)


def run(example: Example, version: str) -> Trial:
    """Builds, fits, saves, reloads, certifies and exports one version of a model."""
    trial = Trial(
        example=example.name,
        version=version,
        edited_lines=edited_lines(example, version),
        reload_note=example.reload_note,
    )
    if example.missing:
        trial.skipped = example.missing
        return trial
    start = time.monotonic()
    keras.backend.clear_session()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # A model without a finite bound warns once an epoch; the bound is recorded below.
        warnings.simplefilter("ignore")
        _run(trial, example, pathlib.Path(folder))
    trial.seconds = time.monotonic() - start
    return trial


def _run(trial: Trial, example: Example, folder: pathlib.Path) -> None:
    x, y = example.batch()
    model: Any = None
    with trial.step("built"):
        model = example.make(trial.version)
        trial.weights = model.count_params()
    if "built" in trial.failures:
        return
    fixed = example.assume_fixed_mask
    # A subclassed model does not tell what it is called on.
    inputs = (x,) if example.subclassed else None
    with trial.step("fitted"):
        monitor = LipschitzMonitor(penalty=0.1, assume_fixed_mask=fixed, inputs=inputs)
        model.fit(x, y, callbacks=[monitor], **_FIT)
    file = folder / "model.keras"
    with trial.step("saved"):
        model.save(file)
    if "saved" in trial.done:
        with trial.step("reloaded"):
            loaded = keras.saving.load_model(
                file, custom_objects=example.custom_objects(trial.version)
            )
            trial.difference = difference(model.predict(x, verbose=0), loaded.predict(x, verbose=0))
            if not trial.difference <= _CLOSE:
                raise ValueError(
                    f"the outputs of the loaded model differ by {trial.difference:.0e}"
                )
    with trial.step("certified"):
        certificate = certify(model, assume_fixed_mask=fixed, inputs=inputs)
        trial.total, trial.log10 = certificate.total, certificate.log10
        trial.reason = first_line(next(iter(certificate.reasons), ""))
    with trial.step("exported"):
        export_saved_model(
            model, folder / "export", assume_fixed_mask=fixed, example_batch=x, verbose=False
        )


def difference(before: Any, after: Any) -> float:
    """Largest difference of the outputs of two models, relative to the largest output."""
    pairs = zip(keras.tree.flatten(before), keras.tree.flatten(after), strict=True)
    return max(
        float(np.max(np.abs(new - old)) / max(np.max(np.abs(old)), 1e-30)) for old, new in pairs
    )


def edited_lines(example: Example, version: str) -> int:
    """Lines in which a version differs from the model as written; a changed line counts once."""
    old, new = (example.source(name).splitlines() for name in ("as_written", version))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


def first_line(error: Exception | str) -> str:
    """The first line that says what happened, with the class of an exception before it."""
    lines = [line.strip() for line in _COLORS.sub("", str(error)).splitlines() if line.strip()]
    # Keras puts what a layer raises below lines of its own, of which one names the layer.
    causes = [line for line in lines if not _is_wrapper(line)]
    wrappers = [line for line in lines[:1] if causes and _is_wrapper(line)]
    line = " ".join([*wrappers, *causes[:1]])
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    return line if isinstance(error, str) else f"{type(error).__name__}: {line}"


def _is_wrapper(line: str) -> bool:
    return line.startswith("Exception encountered when calling") or line.endswith(
        "Error encountered:"
    )
