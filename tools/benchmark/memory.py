"""Peak memory of forward and backward pass against the sequence length.

Every measurement is a process of its own: memory given back is not always seen to be given back.
"""

import dataclasses
import pathlib
import subprocess
import sys

import keras

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._steps import tokens, training_step

CLAIM = (
    "Memory of forward and backward pass grows linearly with the sequence length "
    "(batch 1, 128 features, 4 heads; peak of the whole process)"
)
BATCH, FEATURES, HEADS = 1, 128, 4
LENGTHS = [2048, 4096, 8192, 16384]
# The standard layer holds several matrices of weights at once, each `HEADS * length**2` floats.
MATRICES = 5


def measure():
    peaks, rests, rows = {}, {}, []
    for length in LENGTHS:
        peaks[length], rests[length] = in_process("ours", length)
        rows.append(peak_row("ours", length, peaks[length], rests[length]))
    rows[-1] = dataclasses.replace(rows[-1], at_most=1536.0)
    last, longest = LENGTHS[-2:]
    growth = Row(
        f"ours, {longest} over {last} tokens",
        peaks[longest] / peaks[last],
        "x",
        at_most=2.3,
        details={
            "without the process at rest": (peaks[longest] - rests[longest])
            / (peaks[last] - rests[last])
        },
    )
    rows.append(growth)
    return rows + [standard_row(length) for length in LENGTHS if not FLAGS.quick or length < 8192]


def standard_row(length):
    needed = MATRICES * HEADS * length**2 * 4 / 2**20
    if needed > 0.8 * available_mib():
        reason = f"not run: needs about {needed / 1024:.0f} GiB"
        return Row(f"standard, {length} tokens", None, "MiB", details={"reason": reason})
    return peak_row("standard", length, *in_process("standard", length))


def peak_row(which, length, peak, at_rest):
    return Row(f"{which}, {length} tokens", peak, "MiB", details={"at rest MiB": at_rest})


def in_process(which, length):
    """What `measure_mib` returns in a process of its own."""
    program = (
        f"from tools.benchmark.memory import measure_mib; print(*measure_mib({which!r}, {length}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"{program} failed. Received: status {result.returncode}, {result.stderr[-2000:]!r}"
        )
    peak, at_rest = result.stdout.split()[-2:]
    return float(peak), float(at_rest)


def measure_mib(which, length):
    """Peak of this process over one training step, and what it holds before the step."""
    x = tokens(BATCH, length, FEATURES)
    if which == "ours":
        step = training_step(L2MultiHeadAttention(HEADS, FEATURES // HEADS), x)
    else:
        layer = keras.layers.MultiHeadAttention(HEADS, FEATURES // HEADS)
        step = training_step(layer, x, self_attention=True)
    return peak_and_rest(step)


def peak_and_rest(call):
    """Peak of this process, in MiB, during a call, and what it holds before."""
    at_rest = kib_of("/proc/self/status", "VmRSS") / 1024
    # Linux forgets the peak of what came before.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    call()
    return kib_of("/proc/self/status", "VmHWM") / 1024, at_rest


def available_mib():
    return kib_of("/proc/meminfo", "MemAvailable") / 1024


def kib_of(path, name):
    # Not `getrusage`: its peak counts the process which started this one.
    for line in pathlib.Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1])
    raise RuntimeError(f"Memory is read from Linux's {path}. Received: no line {name!r} in it")


if __name__ == "__main__":
    run("memory", CLAIM, measure)
