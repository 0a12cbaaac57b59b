"""What `spectral_norm` and `lipschitz_bound` cost in training and at inference."""

from keras_lipattn import L2MultiHeadAttention
from tools.benchmark._program import FLAGS, run
from tools.benchmark._report import Row
from tools.benchmark._rounds import alternate
from tools.benchmark._steps import forward, tokens, training_step

CLAIM = (
    "spectral_norm=1 with lipschitz_bound=1 costs little in training and nothing once condensed "
    "(times the layer with caps takes over the layer without)"
)
SHAPE = (8, 128, 256, 8)


def measure():
    batch, length, features, heads = SHAPE
    x = tokens(batch, length, features)
    layers = {
        "none": L2MultiHeadAttention(heads, features // heads),
        "both": L2MultiHeadAttention(
            heads, features // heads, spectral_norm=1.0, lipschitz_bound=1.0
        ),
        "spectral_norm": L2MultiHeadAttention(heads, features // heads, spectral_norm=1.0),
        "lipschitz_bound": L2MultiHeadAttention(heads, features // heads, lipschitz_bound=1.0),
    }
    steps = {name: training_step(layer, x) for name, layer in layers.items()}
    calls = {name: forward(layer, x) for name, layer in layers.items()}
    folded = {name: forward(layer, x, fold=True) for name, layer in layers.items()}
    training = alternate(steps, rounds=FLAGS.rounds)
    changed = alternate(
        {name: _after_a_change(layers[name], call) for name, call in calls.items()},
        rounds=FLAGS.rounds,
    )
    remembered = alternate(calls, rounds=FLAGS.rounds)
    constant = alternate(folded, rounds=FLAGS.rounds)
    return [
        Row.ratio(f"{SHAPE} training step", training, "both", "none", at_most=1.08),
        Row.ratio("training step, spectral_norm alone", training, "spectral_norm", "none"),
        Row.ratio("training step, lipschitz_bound alone", training, "lipschitz_bound", "none"),
        Row.ratio("inference", remembered, "both", "none", at_most=1.5),
        Row.ratio("inference, first call after a change of weights", changed, "both", "none"),
        Row.ratio("inference, condensed as in an export", constant, "both", "none", at_most=1.05),
    ]


def _after_a_change(layer, call):
    """`call` with weights that no call has seen: norms are computed, not remembered."""
    kernel = layer.query_kernel.value

    def changed():
        kernel.assign(kernel * 1.0001)
        return call()

    return changed


if __name__ == "__main__":
    run("caps_cost", CLAIM, measure)
