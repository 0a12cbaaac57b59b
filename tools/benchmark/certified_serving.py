"""Throughput of a served classifier with certified radii, against the same without them."""

import concurrent.futures
import functools
import pathlib
import tempfile

import tensorflow as tf

from keras_lipattn.export import export_saved_model
from tools.benchmark._models import encoder
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import tokens

CLAIM = (
    "Radii cost a served classifier at most a tenth of its throughput (2 blocks of width 128, 64 "
    "tokens, 10 classes; time of the same model without radii over that of signature `certified`)"
)
DEPTH, WIDTH, LENGTH = 2, 128, 64
BATCHES = [1, 8, 32, 256]
CLIENTS = [1, 2]


def measure():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = encoder(DEPTH, WIDTH, LENGTH)
        model.export(folder / "plain", verbose=False)
        path = export_saved_model(model, folder / "ours", verbose=False).path
        # Kept, because a signature alone does not keep the variables of its model.
        plain, ours = tf.saved_model.load(folder / "plain"), tf.saved_model.load(path)
        signatures = {
            "certified": ours.signatures["certified"],
            "serving_default": ours.signatures["serving_default"],
            "plain export": plain.signatures["serving_default"],
        }
        return [
            row
            for clients in CLIENTS
            for batch in BATCHES
            for row in rows(signatures, batch, clients)
        ]


def rows(signatures, batch, clients):
    x = tokens(batch, LENGTH, WIDTH)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        calls = {
            name: functools.partial(_requests, pool, clients, _answer(signature, x))
            for name, signature in signatures.items()
        }
        times = alternate(calls, rounds=FLAGS.rounds)
    noun = "client" if clients == 1 else "clients"
    return [
        Row.ratio(
            f"against {other}, {clients} {noun}, batch {batch}",
            times,
            other,
            "certified",
            at_least=0.9,
        )
        for other in ("serving_default", "plain export")
    ]


def _requests(pool, clients, answer):
    """Every client sends a request and waits for its answer."""
    if clients == 1:
        return answer()
    return [future.result() for future in [pool.submit(answer) for _ in range(clients)]]


def _answer(signature, x):
    (name,) = signature.structured_input_signature[1]
    return lambda: {key: value.numpy() for key, value in signature(**{name: x}).items()}


if __name__ == "__main__":
    run("certified_serving", CLAIM, measure)
