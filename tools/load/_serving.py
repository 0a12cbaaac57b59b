"""Program that serves a SavedModel to many threads with TensorFlow and numpy alone.

Run as `python _serving.py MODEL REQUESTS THREADS BATCH LENGTH SEED MIN_RATIO`.
"""

import sys

for _name in ("keras", "keras_lipattn", "tf_keras"):
    sys.modules[_name] = None  # type: ignore[assignment]

import concurrent.futures
import time

import numpy as np
import tensorflow as tf

# Different requests, and rounds of each signature.
_DIFFERENT = 64
_ROUNDS = 20


def main(
    model: str, requests: int, threads: int, batch: int, length: int, seed: int, min_ratio: float
) -> int:
    loaded = tf.saved_model.load(model)
    signatures = {name: loaded.signatures[name] for name in ("certified", "serving_default")}
    ((name, spec),) = signatures["certified"].structured_input_signature[1].items()
    rng = np.random.default_rng(seed)
    tensors = []
    for _ in range(_DIFFERENT):
        sizes = rng.integers(1, batch + 1), rng.integers(1, length + 1), spec.shape[-1]
        tensors.append(tf.constant(rng.normal(size=sizes).astype(np.float32)))
    # The first answers, one at a time.
    first = [signatures["certified"](**{name: x})["radius"].numpy() for x in tensors]
    for x in tensors:
        signatures["serving_default"](**{name: x})

    def send(signature: str, order: np.ndarray) -> tuple[int, int, int, int]:
        different, not_a_number, examples, positive = 0, 0, 0, 0
        for index in order:
            answer = signatures[signature](**{name: tensors[index]})
            if signature == "certified":
                radius = answer["radius"].numpy()
                different += radius.tobytes() != first[index].tobytes()
                not_a_number += int(np.isnan(radius).sum())
                examples += len(radius)
                positive += int((radius > 0.0).sum())
            else:
                next(iter(answer.values())).numpy()
        return different, not_a_number, examples, positive

    seconds: dict[str, list[float]] = {name: [] for name in signatures}
    counts = np.zeros(4, np.int64)
    sent = 0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number in range(_ROUNDS):
            share = requests * (number + 1) // _ROUNDS - sent
            sent += share
            orders = np.array_split(rng.integers(0, _DIFFERENT, share), threads)
            # Which signature comes first alternates.
            for signature in sorted(signatures, reverse=bool(number % 2)):
                start = time.perf_counter()
                futures = [pool.submit(send, signature, order) for order in orders]
                answers = [future.result() for future in futures]
                seconds[signature].append(time.perf_counter() - start)
                counts += np.sum(answers, axis=0)
    different, not_a_number, examples, positive = map(int, counts)
    certified, plain = (sum(seconds[name]) for name in ("certified", "serving_default"))
    ratios = np.divide(seconds["serving_default"], seconds["certified"])
    print(
        f"seed {seed}: {sent} requests of `certified` by {threads} threads with {examples} "
        f"examples: {different} requests with other radii than before, {not_a_number} radii NaN, "
        f"{positive} above 0\n"
        f"requests per second: {sent / certified:.0f} certified, {sent / plain:.0f} "
        f"serving_default; ratio {plain / certified:.3f} "
        f"(rounds: median {np.median(ratios):.3f}, {ratios.min():.3f} to {ratios.max():.3f})"
    )
    return int(different > 0 or not_a_number > 0 or not plain / certified >= min_ratio)


if __name__ == "__main__":
    model, *numbers, min_ratio = sys.argv[1:]
    requests, threads, batch, length, seed = map(int, numbers)
    sys.exit(main(model, requests, threads, batch, length, seed, float(min_ratio)))
