"""Program that serves a SavedModel to many threads with TensorFlow and numpy alone.

Run as `python _serving.py CERTIFIED PLAIN REQUESTS THREADS BATCH LENGTH SEED MIN_RATIO`; the first
two are paths of an export with the signature `certified` and of one without.
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


def main(paths: list[str], numbers: list[int], min_ratio: float) -> int:
    requests, threads, batch, length, seed = numbers
    # Kept, because a signature alone does not keep the variables of its model.
    models = [tf.saved_model.load(path) for path in paths]
    signatures = {
        "certified": models[0].signatures["certified"],
        "serving_default": models[0].signatures["serving_default"],
        "plain": models[1].signatures["serving_default"],
    }
    calls = {name: _with_tensor(signature) for name, signature in signatures.items()}
    (spec,) = signatures["certified"].structured_input_signature[1].values()
    rng = np.random.default_rng(seed)
    tensors = []
    for _ in range(_DIFFERENT):
        sizes = rng.integers(1, batch + 1), rng.integers(1, length + 1), spec.shape[-1]
        tensors.append(tf.constant(rng.normal(size=sizes).astype(np.float32)))
    # The first answers, one at a time.
    first = [calls["certified"](x)["radius"].numpy() for x in tensors]
    for x in tensors:
        calls["serving_default"](x)
        calls["plain"](x)

    def send(name: str, order: np.ndarray) -> tuple[int, int, int, int]:
        different, not_a_number, examples, positive = 0, 0, 0, 0
        for index in order:
            answer = calls[name](tensors[index])
            if name == "certified":
                radius = answer["radius"].numpy()
                different += radius.tobytes() != first[index].tobytes()
                not_a_number += int(np.isnan(radius).sum())
                examples += len(radius)
                positive += int((radius > 0.0).sum())
            else:
                next(iter(answer.values())).numpy()
        return different, not_a_number, examples, positive

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    counts = np.zeros(4, np.int64)
    sent = 0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number in range(_ROUNDS):
            share = requests * (number + 1) // _ROUNDS - sent
            sent += share
            orders = np.array_split(rng.integers(0, _DIFFERENT, share), threads)
            # Who comes first changes.
            for name in np.roll(list(calls), number):
                start = time.perf_counter()
                futures = [pool.submit(send, name, order) for order in orders]
                answers = [future.result() for future in futures]
                seconds[name].append(time.perf_counter() - start)
                counts += np.sum(answers, axis=0)
    different, not_a_number, examples, positive = map(int, counts)
    print(
        f"seed {seed}: {sent} requests of `certified` by {threads} threads with {examples} "
        f"examples: {different} requests with other radii than before, {not_a_number} radii NaN, "
        f"{positive} above 0"
    )
    rates = {name: sent / sum(values) for name, values in seconds.items()}
    print("requests per second:", ", ".join(f"{rates[name]:.0f} {name}" for name in calls))
    for name in ("serving_default", "plain"):
        ratios = np.divide(seconds[name], seconds["certified"])
        print(
            f"certified against {name}: {rates['certified'] / rates[name]:.3f} "
            f"(rounds: median {np.median(ratios):.3f}, {ratios.min():.3f} to {ratios.max():.3f})"
        )
    slow = rates["certified"] < min_ratio * max(rates["serving_default"], rates["plain"])
    return int(different > 0 or not_a_number > 0 or slow)


def _with_tensor(signature):
    (name,) = signature.structured_input_signature[1]
    return lambda x: signature(**{name: x})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:3], [int(number) for number in sys.argv[3:8]], float(sys.argv[8])))
