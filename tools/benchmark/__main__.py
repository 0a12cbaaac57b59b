"""Runs every benchmark in a process of its own and prints all tables together."""

import pathlib
import subprocess
import sys

from absl import app

from tools.benchmark._program import FLAGS
from tools.benchmark._report import Report, machine_line, table

NAMES = [
    "attention_speed",
    "bounded_speed",
    "long_sequences",
    "caps_cost",
    "spectral_peers",
    "orthogonal_kernels",
    "decoding",
    "export_latency",
    "certified_serving",
    "memory",
    "certify_time",
    "monitor_cost",
    "growth",
]


def main(arguments):
    names = arguments[1:] or NAMES
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise app.UsageError(f"Benchmarks are {', '.join(NAMES)}. Received: {', '.join(unknown)}")
    folder = pathlib.Path(FLAGS.output)
    given = [f"--{name}={FLAGS[name].value}" for name in ("rounds", "output", "quick")]
    if FLAGS.threads is not None:
        given.append(f"--threads={FLAGS.threads}")
    failed = []
    for name in names:
        command = [sys.executable, "-m", f"tools.benchmark.{name}", *given]
        if subprocess.run(command).returncode != 0:
            failed.append(name)
    reports = [
        Report.from_json((folder / f"{name}.json").read_text())
        for name in names
        if name not in failed
    ]
    print("\nEverything together\n")
    for report in reports:
        print(f"{report.claim}\n{machine_line(report.machine)}, {report.rounds} rounds\n")
        print(table(report.rows) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    app.run(main)
