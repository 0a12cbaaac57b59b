"""What the constants gain from structure: masks, mild biases, other norms, activations.

Certified constants without and with the theorems that know the structure. Nothing is measured.

    python examples/papers/structure.py
"""

import math
from unittest import mock

import keras
import numpy as np
import report

import keras_lipattn
from keras_lipattn.bounds import Cliques, unit_head_bound
from keras_lipattn.certification import other_norms
from keras_lipattn.linalg import operator_norm

WINDOWS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = 1024
NORMS = ("l2", "token", "linf")


def window_rows():
    """Theorems 3.D and 3.G for sliding windows of any length of the sequence."""
    rows = []
    for window in WINDOWS:
        reach = window - 1
        row = {"window": window}
        for name, sides in (("two-sided", 2), ("causal", 1)):
            degrees = dict(n_keys=sides * reach, n_queries=sides * reach)
            cliques = Cliques(sides * math.sqrt(reach), sides == 2)
            row[name] = [
                unit_head_bound(None, "any", **degrees).value,
                unit_head_bound(None, "any", **degrees, cliques=cliques).value,
            ]
        rows.append(row)
    return rows


def unit_layer(**options):
    """One head of two features that is the unit head."""
    layer = keras_lipattn.L2MultiHeadAttention(1, 2, use_bias=False, dtype="float64", **options)
    layer.build((None, TOKENS, 2))
    layer.query_kernel.assign(2**0.25 * np.eye(2)[:, None])
    layer.value_kernel.assign(np.eye(2)[:, None])
    layer.output_kernel.assign(np.eye(2)[None])
    return layer


def biased(value):
    """The 2-norm constant of a full mask with equal biases, by Theorem 3.E and with 3.F."""
    layer = unit_layer(max_relative_position=16)
    layer.relative_bias.assign(np.full((1, 32), value))
    with mock.patch(
        "keras_lipattn.layers.l2_multi_head_attention.mild_constants", lambda *_: math.inf
    ):
        before = layer.lipschitz().value
    return [before, layer.lipschitz().value]


def encoder(depth=12, width=64, tokens=32):
    """A pre-norm encoder of Keras with random weights."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((tokens, width))
    for _ in range(depth):
        y = keras.layers.LayerNormalization(epsilon=1e-3)(x)
        x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(4, width // 4)(y, y)])
        y = keras.layers.LayerNormalization(epsilon=1e-3)(x)
        y = keras.layers.Dense(4 * width, activation="gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(width)(y)])
    return keras.Model(inputs, keras.layers.LayerNormalization()(x))


def encoder_logs():
    """Decimal logarithms of the certificates of the encoder, in each norm alone and together."""
    model = encoder()
    alone = dict.fromkeys(NORMS, ())
    rows = {}
    for norm in NORMS:
        with mock.patch.dict(other_norms.OTHERS, alone):
            before = keras_lipattn.certify(model, norm=norm).log10
        rows[norm] = [before, keras_lipattn.certify(model, norm=norm).log10]
    return rows


def perceptron(activation, width=64):
    """The product of the constants of a perceptron, and its certificate."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((width,))
    hidden = keras.layers.Dense(4 * width, activation=activation)
    output = keras.layers.Dense(width)
    model = keras.Model(inputs, output(hidden(inputs)))
    slope = keras_lipattn.bounds.layer_constants.activation_constant(activation)
    norms = [float(operator_norm(np.asarray(layer.kernel))) for layer in (hidden, output)]
    return [slope * math.prod(norms), keras_lipattn.certify(model).total]


def compute(full):
    """All constants; there is one setting."""
    layer = unit_layer()
    array = np.tri(TOKENS)
    return {
        "windows": window_rows(),
        "array": [layer.lipschitz(mask="any").value, layer.lipschitz(mask=array).value],
        "biases": {f"{value:g}": biased(value) for value in (0.0, 0.1, 0.5)},
        "encoder": encoder_logs(),
        "perceptrons": {name: perceptron(name) for name in ("relu", "gelu")},
    }


def draw(results, folder):
    """The plot and the table."""
    fig, (axis,) = report.figure()
    windows = [row["window"] for row in results["windows"]]
    for name, color in (("two-sided", "tab:blue"), ("causal", "tab:orange")):
        for index, line in enumerate(("--", "-")):
            values = [row[name][index] for row in results["windows"]]
            label = f"{name}, " + ("degrees (3.D)", "cliques (3.G)")[index]
            axis.loglog(windows, values, color=color, linestyle=line, label=label)
    axis.set(xlabel="tokens of the window", ylabel="2-norm constant of a head")
    axis.set_title("Sliding windows, any number of tokens")
    axis.legend(frameon=False, fontsize=8)
    report.save(fig, folder, "structure")
    rows = [
        [f"window of {row['window']}, {name}, 2-norm", *(f"{value:.2f}" for value in row[name])]
        for row in results["windows"]
        if row["window"] in (32, 128, 1024)
        for name in ("two-sided", "causal")
    ]
    pairs = [(f"`mask=np.tri({TOKENS})`, 2-norm", results["array"])]
    pairs += [
        (f"biases of {value}, {TOKENS} tokens, 2-norm", pair)
        for value, pair in results["biases"].items()
    ]
    pairs += [
        (f"{name} perceptron 64-256-64", pair) for name, pair in results["perceptrons"].items()
    ]
    rows += [[name, *(f"{value:.2f}" for value in pair)] for name, pair in pairs]
    titles = {"l2": "2-norm", "token": "token norm", "linf": "max norm"}
    rows += [
        [f"pre-norm encoder of 12 layers, {titles[norm]}", *(f"10^{log:.1f}" for log in pair)]
        for norm, pair in results["encoder"].items()
    ]
    header = ["certified constant", "without the structure", "with it"]
    report.table("structure", folder, header, rows)


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("structure", options, compute, draw)


if __name__ == "__main__":
    main()
