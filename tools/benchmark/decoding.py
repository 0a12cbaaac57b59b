"""Tokens per second and bytes of cache in causal decoding, ours and the standard layer."""

import tensorflow as tf

from keras_lipattn import L2MultiHeadAttention, condensed
from tools.benchmark._peers import CachedAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import tokens

CLAIM = (
    "Decoding needs half the cache of keys and values, and is not slower for it "
    "(one layer, token by token; times the standard layer takes over ours)"
)
FEATURES, HEADS = 256, 8
# (batch, tokens)
SIZES = [(1, 256), (8, 256), (8, 1024)]
DECODED = 32


def measure():
    return [row for size in SIZES for row in compare(*size)]


def compare(batch, length):
    ours = L2MultiHeadAttention(HEADS, FEATURES // HEADS)
    peer = CachedAttention(HEADS, FEATURES // HEADS)
    x = tokens(batch, length, FEATURES)
    ours(x)
    peer(x, x)
    with condensed(ours):
        candidates = {"standard": decoder(peer, x), "ours": decoder(ours, x)}
    times = alternate(candidates, rounds=FLAGS.rounds, warm_up=1, seconds=0.0)
    speed = Row.ratio(f"batch {batch}, {length} tokens", times, "standard", "ours", at_least=1.0)
    for name in candidates:
        speed.details[f"{name} tokens/s"] = batch * DECODED / times.milliseconds(name) * 1e3
    bytes_ours, bytes_peer = cache_bytes(ours, batch, length), cache_bytes(peer, batch, length)
    cache = Row(
        f"batch {batch}, {length} tokens, our cache over the standard cache",
        bytes_ours / bytes_peer,
        "x",
        at_most=0.5,
        details={"standard bytes": bytes_peer, "ours bytes": bytes_ours},
    )
    return [speed, cache]


def decoder(layer, x):
    """Function that decodes the last tokens of `x` one by one, each a call of one graph."""
    batch, length, _ = x.shape
    # The cache has its full length from the beginning: every token takes the same time.
    last = range(length - DECODED, length)
    columns = [x[:, i : i + 1] for i in last]
    positions = [tf.constant(i) for i in last]
    cache = layer.init_cache(batch, length)
    step = tf.function(layer.decode, autograph=False)
    concrete = step.get_concrete_function(columns[0], cache, positions[0])

    def decode():
        state = cache
        for column, position in zip(columns, positions, strict=True):
            _, state = concrete(column, state, position)

    return decode


def cache_bytes(layer, batch, length):
    return sum(
        tf.size(tensor).numpy().item() * tensor.dtype.size
        for tensor in tf.nest.flatten(layer.init_cache(batch, length))
    )


if __name__ == "__main__":
    run("decoding", CLAIM, measure)
