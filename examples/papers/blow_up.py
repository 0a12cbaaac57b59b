"""Dot-product attention is not Lipschitz; L2 attention is, unless it is written down wrong.

The norm of the Jacobian along explicit paths on which it grows without bound, for ordinary
attention and for three common mistakes in L2 attention, and along the same paths for
`keras_lipattn.L2MultiHeadAttention`, which stays under its certificate.

    python examples/papers/blow_up.py

Reference:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Theorem 3.1.
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


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("blow_up", options, compute, draw)


if __name__ == "__main__":
    main()
