"""How time and memory grow with tokens, width, heads, depth and batch, as fitted exponents.

    python -m tools.benchmark.growth --threads=1 --output=docs/growth

Writes plots next to the JSON. Every point is a process of its own, forked from one that has
imported everything and run nothing. A line stops before a size that would take too long or too much
memory.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_lipattn import L2MultiHeadAttention, LipschitzMonitor, certify, condensed
from keras_lipattn.export import export_saved_model
from tools.benchmark import decoding
from tools.benchmark._models import change_weights, encoder
from tools.benchmark._peers import CachedAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._steps import forward, tokens, training_step
from tools.benchmark.memory import available_mib, peak_and_rest

CLAIM = (
    "Time and memory grow as their formulas say: fitted exponents of processor time, over the "
    "upper half of the sizes"
)
# What one axis does not vary. Models are shallow where they are wide, and narrow where deep.
LAYER = dict(batch=1, tokens=256, width=256, heads=4)
SHAPES = {
    "tokens": {"layer": LAYER | dict(width=128), "model": dict(depth=2, width=64, heads=4)},
    "width": {"layer": LAYER | dict(heads=8), "model": dict(depth=1, tokens=16, heads=4)},
    "heads": {"layer": LAYER | dict(width=512), "model": dict(depth=2, tokens=16, width=256)},
    "depth": {"model": dict(width=64, tokens=16, heads=4)},
    "batch": {"layer": LAYER | dict(width=128, tokens=64)},
}
SIZES = {
    "tokens": [1024, 2048, 4096, 8192, 16384, 32768],
    "width": [64, 128, 256, 512, 1024, 2048],
    "heads": [1, 2, 4, 8, 16, 32],
    "depth": [1, 2, 4, 8, 16, 32],
    "batch": [1, 2, 4, 8, 16, 32],
}
LAYERS = ["forward", "training step"]
MODELS = ["certify", "monitor's epoch", "export"]
VARIANTS = ["", ", causal", ", window 128"]
# What is measured along each axis; layers of both kinds.
MEASURED = {
    "tokens": [
        *(f"{layer}{variant}" for layer in LAYERS for variant in VARIANTS),
        "decoding a token",
        "certify",
    ],
    "width": [*LAYERS, "training step, caps", "caps of new weights", *MODELS],
    "heads": [*LAYERS, "training step, caps", "caps of new weights", "certify"],
    "depth": MODELS,
    "batch": [*LAYERS, "training step, caps"],
}
WINDOW = 128
# Processor seconds of the longest call; a line stops before one that would take longer.
LONGEST = 40.0
# Nothing grows faster with twice the size: seconds and MiB.
FASTEST = (8.0, 4.0)
# Less is lost in what the process has allocated before.
LEAST_MIB = 8.0
_LEAST = {"seconds": 0.0, "MiB": LEAST_MIB}
# Axes of the plots, and how the names of what is in them begin.
PANELS = [
    ("tokens", ("forward",)),
    ("tokens", ("training",)),
    ("tokens", ("decoding", "certify")),
    ("batch", ("",)),
    ("width", ("forward", "training")),
    ("width", ("caps", *MODELS)),
    ("heads", ("",)),
    ("depth", ("",)),
]
PRELOADED = [
    "keras_lipattn.export",
    "tools.benchmark._models",
    "tools.benchmark._steps",
    "tools.benchmark.decoding",
    "tools.benchmark.memory",
]


@dataclass(frozen=True)
class Line:
    """What one measurement takes at each size of an axis.

    Attributes:
        axis: What grows.
        what: What is measured.
        who: `"ours"` or `"standard"`.
        sizes: The sizes that were run.
        seconds: Processor seconds of one call, of all threads and child processes, the least of
            some.
        mib: Memory at the peak of the first call, on top of the process before it.
        stopped: Why larger sizes were not run.
    """

    axis: str
    what: str
    who: str
    sizes: list[int]
    seconds: list[float]
    mib: list[float]
    stopped: str | None = None

    def row(self) -> Row:
        details = {"axis": self.axis, "what": self.what, "who": self.who, "sizes": self.sizes}
        details["seconds"] = [float(f"{seconds:.3g}") for seconds in self.seconds]
        details["MiB"] = [float(f"{mib:.3g}") for mib in self.mib]
        memory = exponent(self.sizes, self.mib, least=LEAST_MIB)
        if memory is not None:
            details["memory exponent"] = memory
        if self.stopped:
            details["stopped"] = self.stopped
        case = f"{self.what} over {self.axis}, {self.who}"
        return Row(case, exponent(self.sizes, self.seconds), "exponent", details=details)


def exponent(sizes, values, *, least=0.0):
    """Slope of the line of least squares through the upper half of the points, both as logarithms.

    Args:
        sizes: Sizes in ascending order.
        values: A value for each.
        least: Values up to it are noise, and left out.

    Returns:
        The slope, `None` if there are fewer than two points.
    """
    points = [
        (size, value)
        for size, value in list(zip(sizes, values, strict=True))[len(sizes) // 2 :]
        if value > least
    ]
    if len(points) < 2:
        return None
    x, y = np.log(np.transpose(points))
    return float(np.polyfit(x, y, 1)[0])


def measure():
    rows = []
    for axis, measured in MEASURED.items():
        for what in measured:
            for who in ("ours", "standard") if has_standard(what) else ("ours",):
                rows.append(line(axis, what, who).row())
                print(rows[-1], flush=True)
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    draw(rows, folder)
    return rows


def has_standard(what):
    return what.startswith(("forward", "training step", "decoding")) and "caps" not in what


def line(axis, what, who):
    """Measures along an axis until the next size would take too much."""
    sizes, seconds, mib, stopped = [], [], [], None
    for size in SIZES[axis]:
        stopped = reason_to_stop(seconds, mib)
        if stopped:
            break
        spent, memory = in_process(axis, what, who, size, FLAGS.threads)
        sizes.append(size)
        seconds.append(spent)
        mib.append(memory)
    return Line(axis, what, who, sizes, seconds, mib, stopped)


def reason_to_stop(seconds, mib):
    """Why the next size, twice the last, must not be run; `None` if it may."""
    if len(seconds) < 2:
        return None
    longest = 1.0 if FLAGS.quick else LONGEST
    next_seconds, next_mib = (
        values[-1] * min(values[-1] / values[-2], fastest)
        for values, fastest in zip((seconds, mib), FASTEST, strict=True)
    )
    if next_seconds > longest:
        return f"about {next_seconds:.0f} s next"
    if next_mib > 0.4 * available_mib():
        return f"about {next_mib / 1024:.0f} GiB next"
    return None


def in_process(*arguments):
    """What `point` returns in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(point, *arguments).result()


def point(axis, what, who, size, threads):
    """Processor seconds of a call, and the MiB its first one takes on top of the process."""
    if threads is not None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        # What the first call of a process sets up is no matter of size.
        prepare, call = program(axis, what, who, SIZES[axis][0], pathlib.Path(folder))
        prepare()
        call()
        prepare, call = program(axis, what, who, size, pathlib.Path(folder))
        prepare()
        start = _processor_seconds()
        peak, at_rest = peak_and_rest(call)
        first = _processor_seconds() - start
        # The first call has set up its graph, and memory that was never used.
        repeats = 15 if first < 0.1 else 3 if first < 1.0 else 1
        seconds = [_timed(prepare, call) for _ in range(repeats)]
    calls = decoding.DECODED if what.startswith("decoding") else 1
    # The least: other work on the machine only adds.
    return min(seconds) / calls, max(peak - at_rest, 1e-3)


def _timed(prepare, call):
    prepare()
    repeats, start = 0, _processor_seconds()
    while True:
        call()
        repeats += 1
        spent = _processor_seconds() - start
        if spent > 0.02 or prepare is not _nothing:
            return max(spent / repeats, 1e-6)


def _processor_seconds():
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _nothing():
    pass


def program(axis, what, who, size, folder) -> tuple[Callable[[], object], Callable[[], object]]:
    """A function to call before every measurement, and the function to measure."""
    of_model = what in MODELS
    shape = SHAPES[axis]["model" if of_model else "layer"] | {axis: size}
    if of_model:
        return _on_model(what, shape, folder)
    return _on_layer(what, who, shape)


def _on_layer(what, who, shape):
    heads, width = shape["heads"], shape["width"]
    # The caps of new weights over few tokens are little but norms.
    count = 4 if what == "caps of new weights" else shape["tokens"]
    x = tokens(shape["batch"], count, width)
    decodes = what.startswith("decoding")
    peer = CachedAttention if decodes else keras.layers.MultiHeadAttention
    window = WINDOW if "window" in what else None
    cap = 1.0 if "caps" in what else None
    if who == "standard":
        layer = peer(heads, width // heads, sliding_window=window)
    else:
        layer = L2MultiHeadAttention(
            heads,
            width // heads,
            sliding_window=window,
            spectral_norm=cap,
            lipschitz_bound=cap,
        )
    # Not called: over many tokens that alone would take long.
    layer.build(*[x.shape] * (2 if who == "standard" else 1))
    if decodes:
        if who == "standard":
            return _nothing, decoding.decoder(layer, x)
        with condensed(layer):
            return _nothing, decoding.decoder(layer, x)
    step = training_step if what.startswith("training") else forward
    call = step(layer, x, self_attention=who == "standard", causal="causal" in what)
    if what != "caps of new weights":
        return _nothing, call
    kernel = layer.query_kernel.value
    return (lambda: kernel.assign(kernel * 1.0001)), call


def _on_model(what, shape, folder):
    model = encoder(shape["depth"], shape["width"], shape["tokens"], heads=shape["heads"])
    if what == "certify":
        return (lambda: change_weights(model)), (lambda: certify(model))
    if what == "export":
        target = folder / f"{time.monotonic_ns()}"
        return _nothing, (lambda: export_saved_model(model, target, verbose=False))
    monitor = LipschitzMonitor()
    monitor.set_model(model)
    monitor.on_train_begin()
    return (lambda: change_weights(model)), (lambda: monitor.on_epoch_end(0, {}))


def draw(rows, folder):
    """Plots of time and memory in `folder`, a panel for each of `PANELS`, with the exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, unit, key in (("time", "processor s", "seconds"), ("memory", "MiB", "MiB")):
        fig, axes = plt.subplots(2, len(PANELS) // 2, figsize=(20.0, 10.5))
        for panel, (axis, starts) in zip(axes.flat, PANELS, strict=True):
            shown = [row.details for row in rows if row.details["axis"] == axis]
            shown = [details for details in shown if details["what"].startswith(starts)]
            names = list(dict.fromkeys(details["what"] for details in shown))
            for details in shown:
                slope = exponent(details["sizes"], details[key], least=_LEAST[key])
                label = f"{details['what']}, {details['who']}"
                panel.loglog(
                    details["sizes"],
                    [value if value > _LEAST[key] else np.nan for value in details[key]],
                    color=f"C{names.index(details['what'])}",
                    linestyle="-" if details["who"] == "ours" else "--",
                    marker="o" if details["who"] == "ours" else "x",
                    markersize=4,
                    label=label if slope is None else f"{label}: {slope:.2f}",
                )
            panel.set_xticks(SIZES[axis], [f"{size}" for size in SIZES[axis]])
            panel.xaxis.set_minor_locator(plt.NullLocator())
            panel.set_title(f"{unit} over {axis}", fontsize=10)
            panel.grid(True, color="0.9")
            panel.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))
        fig.tight_layout()
        fig.savefig(folder / f"growth_{name}.png", dpi=75, metadata={"Software": None})
        plt.close(fig)


if __name__ == "__main__":
    run("growth", CLAIM, measure)
