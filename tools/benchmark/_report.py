"""What a benchmark found: rows with targets, as JSON and as a table."""

import dataclasses
import json
import math
import os
import pathlib
import platform
import typing
from dataclasses import dataclass, field

import keras

from tools.benchmark._rounds import Rounds, Spread

FOLDER = pathlib.Path("build/bench")


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        case: What was measured.
        value: The number, a median where there are rounds. `None` if it could not be measured.
        unit: `"x"` for a ratio of times, `"ms"`, `"s"`, `"MiB"`, ...
        spread: Lower and upper quartile over the rounds.
        at_least: What is aimed at, from below.
        at_most: What is aimed at, from above.
        details: Further numbers, by name; also the reason for a missing value.
    """

    case: str
    value: float | None
    unit: str
    spread: tuple[float, float] | None = None
    at_least: float | None = None
    at_most: float | None = None
    details: dict[str, typing.Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; `None` without a target or a value."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @classmethod
    def ratio(cls, case, rounds: Rounds, slow, fast, **targets) -> "Row":
        """How many times longer `slow` takes than `fast`."""
        ratio = rounds.ratio(slow, fast)
        details = {f"{name} ms": rounds.milliseconds(name) for name in (slow, fast)}
        details["processor ratio"] = rounds.processor_ratio(slow, fast)
        return cls(case, ratio.median, "x", (ratio.low, ratio.high), details=details, **targets)

    @classmethod
    def sample(cls, case, sample, unit, **targets) -> "Row":
        """Median of a sample."""
        spread = Spread.of(sample)
        return cls(case, spread.median, unit, (spread.low, spread.high), **targets)


@dataclass(frozen=True)
class Report:
    """The rows of one benchmark, with what is needed to judge them.

    Attributes:
        name: Name of the benchmark.
        claim: The sentence which the rows are to bear out.
        rows: The numbers.
        rounds: Number of rounds behind a median.
        machine: Processor, memory, threads, versions, and the load when the report was made.
    """

    name: str
    claim: str
    rows: list[Row]
    rounds: int
    machine: dict[str, typing.Any]

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for entry, row in zip(content["rows"], self.rows, strict=True):
            entry["holds"] = row.holds
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text) -> "Report":
        content = json.loads(text)
        rows = []
        for entry in content.pop("rows"):
            del entry["holds"]
            spread = entry.pop("spread")
            rows.append(Row(spread=spread and tuple(spread), **entry))
        return cls(rows=rows, **content)

    def publish(self, folder: pathlib.Path) -> None:
        """Writes `folder/NAME.json` and prints the table."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(self.to_json())
        print(f"\n{self.claim}\n{machine_line(self.machine)}, {self.rounds} rounds\n")
        print(table(self.rows), flush=True)


def machine() -> dict[str, typing.Any]:
    """The machine and what runs on it."""
    backend = keras.backend.backend()
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count() or 1,
        "memory GiB": round(_memory_gib(), 1),
        **{"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}[backend](),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": backend,
    }


def _on_tensorflow():
    import tensorflow as tf

    threading = tf.config.threading
    return {
        "devices": sorted({device.device_type for device in tf.config.list_physical_devices()}),
        "threads within operations": _threads(
            threading.get_intra_op_parallelism_threads(), "TF_NUM_INTRAOP_THREADS"
        ),
        "threads between operations": _threads(
            threading.get_inter_op_parallelism_threads(), "TF_NUM_INTEROP_THREADS"
        ),
        "tensorflow": tf.__version__,
    }


def _on_jax():
    import jax  # pyright: ignore[reportMissingImports]

    cores = os.cpu_count() or 1
    return {
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "threads within operations": cores,
        "threads between operations": 1,
        "jax": jax.__version__,
    }


def _on_torch():
    import torch  # pyright: ignore[reportMissingImports]

    return {
        "devices": [torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"],
        "threads within operations": torch.get_num_threads(),
        "threads between operations": torch.get_num_interop_threads(),
        "torch": str(torch.__version__),
    }


_NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def machine_line(machine) -> str:
    backend = machine["backend"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory GiB']} GiB; "
        f"{machine['threads within operations']} threads within and "
        f"{machine['threads between operations']} between operations; "
        f"load before {machine['load before']}; {_NAMES[backend]} {machine[backend]}, "
        f"Keras {machine['keras']} on {backend}"
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, columns lined up."""
    cells = [["case", "median", "quartiles", "target", "holds", "details"]]
    cells += [
        [
            row.case,
            "-" if row.value is None else f"{_number(row.value)} {row.unit}",
            "" if row.spread is None else " - ".join(map(_number, row.spread)),
            _target(row),
            {True: "yes", False: "no", None: ""}[row.holds],
            ", ".join(f"{key} {_number(value)}" for key, value in row.details.items()),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _target(row):
    parts = []
    if row.at_least is not None:
        parts.append(f">= {_number(row.at_least)}")
    if row.at_most is not None:
        parts.append(f"<= {_number(row.at_most)}")
    return ", ".join(parts)


def _number(value):
    if not isinstance(value, float):
        return str(value)
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    # Three digits, but never an exponent for numbers which a reader can take in without.
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _threads(configured, variable):
    # TensorFlow asks the environment where nothing is configured, and takes all cores at last.
    return configured or int(os.environ.get(variable, 0)) or os.cpu_count() or 1


def _processor_name():
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
