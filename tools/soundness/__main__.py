"""Certifies random models and attacks them: no lower estimate may exceed a certificate.

    python -m tools.soundness --minutes=10 --seed=0

prints how many models and comparisons there were and the worst ratio of what was found to what is
certified. A ratio above 1 is a wrong certificate: a script that reproduces it is printed, and the
exit code is 1.
"""

import time

from absl import app, flags

from tools.soundness.attack import attack
from tools.soundness.generate import random_subject

_MINUTES = flags.DEFINE_float("minutes", 10.0, "How long to go on.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the models.", lower_bound=0)

_SCRIPT = """
# A {kind} certificate in the norm {norm} is wrong: found {found:.9g} > certified {certified:.9g}.
# Run this from the root of the repository.
from tools.soundness.attack import attack
from tools.soundness.generate import random_subject

subject = random_subject(seed={seed}, index={index})
subject.model.summary()
for comparison in attack(subject, seed={index}):
    print(comparison, comparison.ratio)
"""


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    end = time.monotonic() + 60.0 * _MINUTES.value
    seed, index, count, violations = _SEED.value, 0, 0, 0
    worst = {kind: (0.0, "none") for kind in ("global", "local")}
    while index == 0 or time.monotonic() < end:
        subject = random_subject(seed, index)
        kinds = " ".join(type(layer).__name__ for layer in subject.model.layers[1:])
        for comparison in attack(subject, seed=index):
            count += 1
            where = f"index {index}, {comparison.kind}, {comparison.norm}: {kinds}"
            worst[comparison.kind] = max(worst[comparison.kind], (comparison.ratio, where))
            if comparison.is_violation:
                violations += 1
                print(
                    _SCRIPT.format(
                        kind=comparison.kind,
                        norm=comparison.norm,
                        found=comparison.found,
                        certified=comparison.certified,
                        seed=seed,
                        index=index,
                    )
                )
        index += 1
    print(f"seed {seed}: {index} models, {count} comparisons, {violations} violations")
    for kind, (ratio, where) in worst.items():
        print(f"worst ratio of found to certified, {kind}: {ratio:.9f} ({where})")
    return 1 if violations else 0


if __name__ == "__main__":
    app.run(main)
