"""How long `certify` takes, by depth and width of the model."""

import time

from keras_lipattn import certify
from tools.benchmark._models import change_weights, encoder
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import Spread

CLAIM = "certify takes time linear in the depth, and a few seconds at width 512"
TOKENS = 64
# (depth, width)
SIZES = [(2, 128), (4, 128), (8, 128), (16, 128), (4, 256), (4, 512), (12, 512)]
LONG = [(12, 512)]
# Seconds.
TARGETS = {(12, 512): 1.5}


def measure():
    return [row(*size) for size in SIZES if not (FLAGS.quick and size in LONG)]


def row(depth, width):
    model = encoder(depth, width, TOKENS)
    certify(model)
    seconds, processor = [], []
    for _ in range(max(1, FLAGS.rounds // 5)):
        change_weights(model)
        start, busy = time.perf_counter(), time.process_time()
        certify(model)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    details = {"processor s": Spread.of(processor).median}
    at_most = TARGETS.get((depth, width))
    case = f"depth {depth}, width {width}"
    return Row.sample(case, seconds, "s", at_most=at_most, details=details)


if __name__ == "__main__":
    run("certify_time", CLAIM, measure)
