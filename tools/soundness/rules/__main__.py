"""Attacks every rule of `certify`: no lower estimate may exceed a certified constant.

    python -m tools.soundness.rules --comparisons=10000 --seed=0

prints the numbers of subjects and comparisons, every problem with its subject, and the worst ratio
of a lower estimate to a certified constant. To attack a single subject:

    python -m tools.soundness.rules --seed=0 --index=123

The exit code is 1 if there was a problem.
"""

from absl import app, flags

from tools.soundness.rules.run import attack_one, attack_rules

_COMPARISONS = flags.DEFINE_integer("comparisons", 10_000, "Number of comparisons.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the subjects.", lower_bound=0)
_INDEX = flags.DEFINE_integer("index", None, "Attack only this subject.", lower_bound=0)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    if _INDEX.value is not None:
        problems = attack_one(_SEED.value, _INDEX.value)
    else:
        problems = attack_rules(_SEED.value, _COMPARISONS.value)
    return 1 if problems else 0


if __name__ == "__main__":
    app.run(main)
