"""How much faster capped L2 attention is than what one would write with Keras alone."""

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._peers import PlainDistanceAttention, SpectralNormalizedAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import forward, tokens, training_step

CLAIM = (
    "L2MultiHeadAttention with spectral_norm=1 is faster than attention over Dense layers in "
    "keras.layers.SpectralNormalization, and without caps than L2 attention with four projections "
    "(times the peer takes over ours)"
)
SHAPE = (8, 128, 256, 8)


def measure():
    batch, length, features, heads = SHAPE
    x = tokens(batch, length, features)
    layers = {
        "SpectralNormalization": SpectralNormalizedAttention(heads, features // heads),
        "ours, spectral_norm": L2MultiHeadAttention(heads, features // heads, spectral_norm=1.0),
        "four projections": PlainDistanceAttention(heads, features // heads),
        "ours": L2MultiHeadAttention(heads, features // heads),
    }
    pairs = [("SpectralNormalization", "ours, spectral_norm"), ("four projections", "ours")]
    calls = {name: forward(layer, x) for name, layer in layers.items()}
    steps = {name: training_step(layer, x) for name, layer in layers.items()}
    layers["ours, spectral_norm"].condense()
    times = alternate(calls, rounds=FLAGS.rounds)
    training = alternate(steps, rounds=FLAGS.rounds)
    return [
        Row.ratio(f"{SHAPE} {mode}, {peer}", rounds, peer, ours)
        for mode, rounds in (("forward", times), ("training step", training))
        for peer, ours in pairs
    ]


if __name__ == "__main__":
    run("spectral_peers", CLAIM, measure)
