"""Dot-product attention is not Lipschitz; L2 attention is, unless it is written down wrong.

The norm of the Jacobian along explicit paths on which it grows without bound, for ordinary
attention and for three common mistakes in L2 attention, and along the same paths for
`keras_lipattn.L2MultiHeadAttention`, which stays under its certificate.

    python examples/papers/blow_up.py

A second table is about dot-product attention on bounded tokens. A constant that is published for
training with enforced Lipschitz constants holds for one head, and fails for several.

References:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Theorem 3.1.
    Newhouse et al., "Training Transformers with Enforced Lipschitz Constants", 2025.
"""

import keras
import numpy as np
import report
import tensorflow as tf

import keras_lipattn

TOKENS = 9
# One head that reads the first of two features; its values are the sum of both.
QUERY = np.array([[1.0], [0.0]])
VALUE = np.array([[1.0], [1.0]])
OUTPUT = np.array([[1.0, 0.0]])
UNTIED_KEY = 2.0 * QUERY

# The second experiment: heads that share a width, and tokens of root mean square at most 1.
HEADS = (1, 2, 4)
WIDTH = 8
FEW = 6

STYLES = {
    "dot-product": ("tab:red", "-"),
    "L2, key not tied to query": ("tab:orange", "--"),
    "L2, own token hidden": ("tab:purple", ":"),
    "L2, no factor W_Q W_Q^T": ("tab:brown", "-."),
}


def two_groups(t, first):
    """The first token at the origin, half of the others at `first + t e_2`, half opposite.

    With `first = 0` and the features exchanged this is the path of Theorem 3.1: the first query
    sees all keys alike, and their variance, which is a derivative, is `t**2`.
    """
    signs = np.array([0.0] + [1.0, -1.0] * (TOKENS // 2))
    return signs[None, :, None] * np.stack([np.broadcast_to(first, t.shape), t], -1)[:, None]


def paths(t):
    """For each kind of attention the tokens `(len(t), TOKENS, 2)` on which it blows up."""
    apart = two_groups(t, 0.0)[..., ::-1]
    # With keys 2 x the first query, t, is as far from 2 (3t/4) as from 2 (t/4), and further from
    # its own key 2 t: it attends to two far groups at once.
    untied = np.zeros_like(apart)
    untied[:, 0, 0] = t
    untied[:, 1::2, 0] = 0.75 * t[:, None]
    untied[:, 2::2, 0] = 0.25 * t[:, None]
    names = list(STYLES)
    # The last one moves the feature that distances do not see, at a fixed distance of the groups.
    return dict(zip(names, (apart, untied, apart, two_groups(t, 1.5)), strict=True))


def dot_product():
    """`keras.layers.MultiHeadAttention` with the weights of this experiment."""
    layer = keras.layers.MultiHeadAttention(1, 1, value_dim=1, use_bias=False, dtype="float64")
    layer.build((None, TOKENS, 2), (None, TOKENS, 2))
    layer.set_weights([QUERY[:, None], QUERY[:, None], VALUE[:, None], OUTPUT[None]])
    return lambda x: layer(x, x)


def l2_attention():
    """`keras_lipattn.L2MultiHeadAttention` with the weights of this experiment."""
    layer = keras_lipattn.L2MultiHeadAttention(1, 1, value_dim=1, use_bias=False, dtype="float64")
    layer.build((None, TOKENS, 2))
    for kernel, value in zip(
        (layer.query_kernel, layer.value_kernel, layer.output_kernel),
        (QUERY[:, None], VALUE[:, None], OUTPUT[None]),
        strict=True,
    ):
        kernel.assign(value)
    return layer


def wrong_l2_attention(*, key=QUERY, own_token=True, factor=True):
    """Attention by distance with one of the mistakes."""

    def attend(x):
        queries, keys = x @ QUERY, x @ key
        scores = -tf.square(queries - tf.linalg.matrix_transpose(keys))
        if not own_token:
            scores = tf.where(np.eye(TOKENS, dtype=bool), -np.inf, scores)
        values = x @ (QUERY @ QUERY.T) if factor else x
        return tf.nn.softmax(scores) @ values @ (VALUE @ OUTPUT)

    return attend


def jacobian_norms(function, x):
    """Norm of the Jacobian at every `x[i]`, `(len(x),)`."""
    tokens = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(tokens)
        y = function(tokens)
    jacobian = tape.batch_jacobian(y, tokens).numpy()
    size = x[0].size
    return np.linalg.norm(jacobian.reshape(-1, size, size), 2, axis=(1, 2))


def enforced_constants(heads):
    """Constants of attention with orthogonal weights, tokens in the norm max RMS <= 1.

    Returns:
        The published one, and the same with the factors that several heads need: the values that
        heads take from different tokens add up to `sqrt(heads)`, and a head's scores are products
        of vectors that may hold the whole size of a token, divided by its own width.
    """
    return (1.0 + 2.0) / 3.0, (heads**0.5 + 2.0 * heads) / 3.0


def largest_growth(heads, restarts, steps):
    """Largest factor found by which attention expands a change of its tokens in the norm max RMS.

    Tokens, orthogonal weights and the change climb together. The factor is that of the last token,
    which sees all tokens under a causal mask, too.
    """
    rng = np.random.default_rng(0)
    size = (restarts, FEW, WIDTH)
    tokens, change = (tf.Variable(rng.normal(size=size)) for _ in range(2))
    kernels = tf.Variable(rng.normal(size=(restarts, 3, WIDTH, WIDTH)))
    own = WIDTH // heads

    def split(x):
        return tf.transpose(tf.reshape(x, (restarts, FEW, heads, own)), (0, 2, 1, 3))

    def attend(x, query, key, value):
        scores = split(x @ query) @ tf.linalg.matrix_transpose(split(x @ key)) / own
        values = tf.nn.softmax(scores) @ split(x @ value)
        joined = tf.reshape(tf.transpose(values, (0, 2, 1, 3)), size)
        return joined / 3.0

    def rms(x):
        return tf.sqrt(tf.reduce_mean(tf.square(x), axis=-1, keepdims=True))

    optimizer = keras.optimizers.Adam(0.05)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            weights = tf.unstack(tf.linalg.qr(kernels)[0], axis=1)
            x, push = tokens / tf.maximum(rms(tokens), 1.0), 1e-5 * change / rms(change)
            moved = attend(x + push, *weights) - attend(x - push, *weights)
            factors = rms(moved[:, -1]) / 2e-5
            loss = -tf.reduce_sum(factors)
        variables = (tokens, change, kernels)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.reduce_max(factors)

    return max(float(step()) for _ in range(steps))


def enforced(full):
    """For each number of heads the two constants and what is found."""
    effort = (48, 400) if full else (12, 150)
    rows = []
    for heads in HEADS:
        published, sound = enforced_constants(heads)
        found = largest_growth(heads, *effort)
        rows.append({"heads": heads, "published": published, "found": found, "sound": sound})
    return rows


def compute(full):
    """Norms of the Jacobians along the paths, up to distance 100 (1000 in the full setting)."""
    t = np.geomspace(0.1, 1000.0 if full else 100.0, 121 if full else 61)
    ours = l2_attention()
    names = list(STYLES)
    wrong = (
        dot_product(),
        wrong_l2_attention(key=UNTIED_KEY),
        wrong_l2_attention(own_token=False),
        wrong_l2_attention(factor=False),
    )
    bound = ours.lipschitz()
    curves = {}
    for name, function in zip(names, wrong, strict=True):
        x = paths(t)[name]
        norms = jacobian_norms(function, x)
        curves[name] = {
            "norm": norms.tolist(),
            "l2_norm": jacobian_norms(ours, x).tolist(),
            "exponent": float(np.log(norms[-1] / norms[-11]) / np.log(t[-1] / t[-11])),
        }
    return {
        "tokens": TOKENS,
        "distance": t.tolist(),
        "certified": bound.value,
        "published": bound.published,
        "curves": curves,
        "enforced": enforced(full),
    }


def draw(results, folder):
    """The plot and the table."""
    t = results["distance"]
    fig, (axis,) = report.figure()
    for name, (color, line) in STYLES.items():
        axis.loglog(t, results["curves"][name]["norm"], color=color, linestyle=line, label=name)
    for index, curve in enumerate(results["curves"].values()):
        label = None if index else "L2MultiHeadAttention, same four paths"
        axis.loglog(t, curve["l2_norm"], color="tab:blue", linewidth=1, label=label)
    axis.axhline(results["certified"], color="tab:blue", linestyle="--", label="its certificate")
    axis.axhline(results["published"], color="0.5", linestyle="--", label="its published bound")
    axis.set(xlabel="distance $t$ along the path", ylabel="norm of the Jacobian")
    axis.set_title(f"One head, {results['tokens']} tokens")
    axis.legend(frameon=False, fontsize=8)
    report.save(fig, folder, "blow_up")
    rows = [
        [
            name,
            f"{curve['norm'][-1]:.4g}",
            f"{curve['exponent']:.2f}",
            f"{max(curve['l2_norm']):.3f}",
        ]
        for name, curve in results["curves"].items()
    ]
    report.table(
        "blow_up",
        folder,
        [
            "attention",
            f"Jacobian norm at t = {t[-1]:g}",
            "grows like t to the",
            f"L2MultiHeadAttention on the same path (certified {results['certified']:.3f})",
        ],
        rows,
    )
    names = ("published", "found", "sound")
    report.table(
        "enforced",
        folder,
        ["heads", "published constant", "found", "constant with the number of heads"],
        [
            [str(row["heads"]), *(f"{row[name]:.3f}" for name in names)]
            for row in results["enforced"]
        ],
    )


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("blow_up", options, compute, draw)


if __name__ == "__main__":
    main()
