"""Attacks every rule of `certify`: no number found may exceed a certified one.

    python -m tools.soundness.rules --comparisons=10000 --seed=0

prints how many subjects and comparisons there were, every problem with a description that can be
followed, and the worst ratio of what was found to what is certified. One subject alone:

    python -m tools.soundness.rules --seed=0 --index=123

The exit code is 1 if there was a problem.
"""

from absl import app, flags

from tools.soundness.rules.run import attack_one, attack_rules

_COMPARISONS = flags.DEFINE_integer("comparisons", 10_000, "How many to make.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the subjects.", lower_bound=0)
_INDEX = flags.DEFINE_integer("index", None, "Attack this subject only.", lower_bound=0)


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
