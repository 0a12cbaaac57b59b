"""Attacks every statement: `python -m tools.soundness.statements --comparisons 100000`.

Prints the worst ratio of each. Exits with 1 if one is above 1 + 1e-9.
"""

import argparse
import importlib
import pkgutil
import sys
import zlib

import numpy as np

from tools.soundness import statements
from tools.soundness.statements import Statement

ALLOWED = 1.0 + 1e-9
_BATCH = 2000


def all_statements() -> list[Statement]:
    """The statements of all modules of the package, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(statements.__path__))
    modules = [importlib.import_module(f"{statements.__name__}.{name}") for name in names]
    return [one for module in modules for one in getattr(module, "STATEMENTS", ())]


def attack(statement: Statement, comparisons: int, seed: int) -> tuple[int, float]:
    """Number of comparisons and the worst ratio."""
    rng = np.random.default_rng((seed, zlib.crc32(statement.name.encode())))
    count, worst = 0, 0.0
    while count < comparisons:
        found = statement.ratios(rng, min(_BATCH, comparisons - count))
        if np.isnan(found).any():
            raise ValueError(f"{statement.name}: a ratio is NaN. Received: {found}")
        count, worst = count + found.size, max(worst, float(found.max()))
    return count, worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=100_000, help="over all statements")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    found = all_statements()
    each = -(-options.comparisons // len(found))
    total, refuted = 0, False
    for statement in found:
        count, worst = attack(statement, each, options.seed)
        total, refuted = total + count, refuted or worst > ALLOWED
        mark = "" if worst <= ALLOWED else "  REFUTED"
        print(f"{statement.name:62s} {count:7d} comparisons, worst ratio {worst:.9f}{mark}")
    print(f"{total} comparisons")
    return int(refuted)


if __name__ == "__main__":
    sys.exit(main())
