"""Runs of the attack that print what they find."""

import collections
import time

from tools.soundness.rules.attack import attack
from tools.soundness.rules.cases import all_cases
from tools.soundness.rules.subjects import Illegal, rule_subject


def attack_rules(seed: int, comparisons: int) -> int:
    """Attacks subjects of all cases in turn until there are this many comparisons.

    Returns:
        The number of problems, each of which is printed.
    """
    begin, count, index, problems, legal, refused = time.monotonic(), 0, 0, 0, 0, 0
    worst = (0.0, "none")
    finite: collections.Counter[str] = collections.Counter()
    while count < comparisons:
        try:
            subject = rule_subject(seed, index)
            outcome = attack(subject, index)
        except Illegal:
            index += 1
            continue
        legal += 1
        count += len(outcome.comparisons)
        refused += not outcome.comparisons
        finite[subject.case] += bool(outcome.comparisons)
        for one in outcome.comparisons:
            if not one.is_violation:
                worst = max(worst, (one.ratio, f"index {index}, {one.kind}, {one.norm}"))
        for problem in outcome.problems:
            problems += 1
            print(f"PROBLEM seed {seed} index {index}: {problem}\n    {subject.text}", flush=True)
        index += 1
    print(
        f"seed {seed}: {legal} subjects ({refused} without a finite certificate), "
        f"{index - legal} combinations that Keras refuses, {count} comparisons, "
        f"{problems} problems, {time.monotonic() - begin:.0f} s"
    )
    never = sorted({case.name for case in all_cases()} - set(+finite))
    print("never certified: " + (", ".join(never) or "none"))
    print(f"worst ratio of found to certified without a problem: {worst[0]:.9f} ({worst[1]})")
    return problems


def attack_one(seed: int, index: int) -> int:
    """Attacks one subject and prints everything about it.

    Returns:
        The number of problems.
    """
    subject = rule_subject(seed, index)
    print(subject.text)
    print("options:", subject.options)
    subject.model.summary()
    outcome = attack(subject, index)
    for norm, reason in outcome.refusals.items():
        print(f"not finite in {norm}: {reason}")
    for comparison in outcome.comparisons:
        print(f"{comparison.kind} {comparison.norm}: {comparison.ratio:.9f}")
    for problem in outcome.problems:
        print("PROBLEM", problem)
    return len(outcome.problems)
