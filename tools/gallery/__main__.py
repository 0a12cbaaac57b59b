"""Takes every model of the gallery from building to export and writes docs/gallery.md.

python -m tools.gallery
python -m tools.gallery --output=build/gallery.md vision_transformer tab_transformer
"""

import pathlib

from absl import app, flags, logging

from examples.gallery import EXAMPLES, VERSIONS
from tools.benchmark._report import machine, machine_line
from tools.gallery.page import page, total
from tools.gallery.trial import run

_OUTPUT = flags.DEFINE_string("output", "docs/gallery.md", "The page to write.")


def main(arguments):
    known = {example.name: example for example in EXAMPLES}
    names = arguments[1:] or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise app.UsageError(f"Models are {', '.join(known)}. Received: {', '.join(unknown)}")
    # TensorFlow reports every file that it writes.
    logging.set_verbosity(logging.ERROR)
    where = machine_line(machine())
    trials = []
    for name in names:
        for version in VERSIONS:
            trial = run(known[name], version)
            trials.append(trial)
            outcome = trial.skipped or f"total {total(trial)}, {trial.seconds:.0f} s"
            print(f"{name}, {version}: {outcome}", flush=True)
            for step, line in trial.failures.items():
                print(f"    {step}: {line}", flush=True)
            if trial.reason:
                print(f"    reason: {trial.reason}", flush=True)
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(trials, where))
    print(f"wrote {output}")


if __name__ == "__main__":
    app.run(main)
