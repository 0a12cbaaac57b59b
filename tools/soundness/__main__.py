"""Certifies random models and attacks them: no lower estimate may exceed a certificate.

    python -m tools.soundness --minutes=10 --seed=0

Every eighth model is a chain of layers (`generate`), whose attack takes many times as long. The
other models are whole models as users write them (`whole`). The summary has the numbers of models,
comparisons and finite certificates, and the worst ratio of a lower estimate to a certificate. A
certificate is wrong if this ratio is above 1, or if the examples of a batch depend on each other.
For each wrong certificate and each crash of `certify`, the program prints a script that reproduces
it, and the exit code is 1.
"""

import collections
import dataclasses
import time

from absl import app, flags

from tools.soundness import attack as chains
from tools.soundness.generate import random_subject
from tools.soundness.rules import attack as compositions
from tools.soundness.rules.subjects import Illegal, first_line
from tools.soundness.whole import whole_subject

_MINUTES = flags.DEFINE_float("minutes", 10.0, "Minutes to run.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the models.", lower_bound=0)

_SCRIPT = """
# {text}
# Run this from the root of the repository.
from tools.soundness.{module} import attack
from tools.soundness.{generator} import {function}

subject = {function}(seed={seed}, index={index})
subject.model.summary()
print(attack(subject, seed={index}))
"""


@dataclasses.dataclass
class Result:
    """Findings about one model.

    Args:
        text: description of the model.
        comparisons: certified constants with lower estimates, of either attack.
        violations: messages about wrong certificates.
        crashes: messages about calls of `certify` that raise an error.
        certificates: number of finite certificates.
    """

    text: str
    comparisons: list = dataclasses.field(default_factory=list)
    violations: list[str] = dataclasses.field(default_factory=list)
    crashes: list[str] = dataclasses.field(default_factory=list)
    certificates: int = 0


def attack_chain(seed: int, index: int) -> Result:
    """Attacks a chain of layers."""
    subject = random_subject(seed, index)
    result = Result(" ".join(type(layer).__name__ for layer in subject.model.layers[1:]))
    try:
        result.comparisons = chains.attack(subject, seed=index)
    except Exception as error:
        result.crashes.append(first_line(error))
        return result
    result.certificates = len({one.norm for one in result.comparisons})
    result.violations = [
        f"A {one.kind} certificate in the norm {one.norm} is wrong: "
        f"found {one.found:.9g} > certified {one.certified:.9g}."
        for one in result.comparisons
        if one.is_violation
    ]
    if result.certificates and not chains.examples_are_independent(subject):
        result.violations.append(
            "Examples of a batch depend on each other, but there is a certificate."
        )
    return result


def attack_whole(seed: int, index: int) -> Result:
    """Attacks a whole model."""
    subject = whole_subject(seed, index)
    outcome = compositions.attack(subject, index)
    result = Result(subject.text, outcome.comparisons)
    result.certificates = len({one.norm for one in outcome.comparisons if one.kind != "pair"})
    for problem in outcome.problems:
        # A refutation by `certify(check=True)` is a wrong certificate, not a crash.
        is_crash = "crashes" in problem and "CertificateRefuted" not in problem
        (result.crashes if is_crash else result.violations).append(f"{problem}: {subject.text}")
    return result


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    end = time.monotonic() + 60.0 * _MINUTES.value
    seed, index = _SEED.value, 0
    total: collections.Counter[str] = collections.Counter()
    worst: dict[str, tuple[float, str]] = {}
    while index == 0 or time.monotonic() < end:
        whole = index % 8 != 0
        try:
            result = (attack_whole if whole else attack_chain)(seed, index)
        except Illegal as error:
            print(
                f"index {index} does not run; this is an error in the generator: {error}",
                flush=True,
            )
            total["illegal"] += 1
            index += 1
            continue
        total["comparisons"] += len(result.comparisons)
        total["finite"] += result.certificates
        total["violations"] += len(result.violations)
        total["crashes"] += len(result.crashes)
        for one in result.comparisons:
            where = f"index {index}, {one.norm}: {result.text}"
            worst[one.kind] = max(worst.get(one.kind, (0.0, "none")), (one.ratio, where))
        for text in [*result.violations, *result.crashes]:
            module, name = ("rules.attack", "whole") if whole else ("attack", "generate")
            function = "whole_subject" if whole else "random_subject"
            script = dict(module=module, generator=name, function=function, seed=seed, index=index)
            print(_SCRIPT.format(text=text, **script), flush=True)
        index += 1
    print(
        f"seed {seed}: {index - total['illegal']} models, {total['comparisons']} comparisons, "
        f"{total['violations']} violations, {total['crashes']} crashes, "
        f"{total['finite']} finite certificates"
    )
    for kind, (ratio, where) in worst.items():
        print(f"worst ratio of found to certified, {kind}: {ratio:.9f} ({where})")
    return 1 if total["violations"] or total["crashes"] else 0


if __name__ == "__main__":
    app.run(main)
