"""How tight the bounds are: published, ours, and the largest Jacobian found by optimization.

For one L2 attention head with identity weights, N from 2 to 1024 tokens, full and causal masks:

    2-norm       largest singular value of the Jacobian, d = 1 feature (more found nothing larger;
                 the star has d = N)
    token norm   largest sum over keys of the norms of the blocks of a row, d = 2
    max norm     largest absolute row sum of the Jacobian, d = 1 (the setting of the paper), d = 4

The lower bounds are the best of structured witnesses (two groups around a center, a hub with a
star) and of L-BFGS from them and from random inputs, with analytic Jacobian-vector products: no
Jacobian is ever formed.

    python examples/papers/tightness.py

Reference:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 5.1.
"""

import numpy as np
import report
import tensorflow as tf
from scipy.optimize import minimize

from keras_lipattn.bounds import certified_layer_bound, phi_inv, published_layer_bound, s_star

SMALL = (2, 3, 4, 8, 16, 33, 64)
FULL = (2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024)
MASKS = ("full", "causal")
# Title, norm and number of features.
SETTINGS = {
    "l2": ("2-norm", "l2", 1),
    "token": ("token norm", "token", 2),
    "linf": ("max norm, one feature", "linf", 1),
    "linf 4": ("max norm, four features", "linf", 4),
}
# The hub of the star witness needs a dimension a token: above this it is left out (there it is
# below the two groups anyway).
LARGEST_STAR = 64


def pairs(y, mask):
    """Differences `y_j - y_i` `(N, N, d)` and attention weights `(N, N)`."""
    edges = y[None] - y[:, None]
    scores = -tf.reduce_sum(tf.square(edges), -1)
    if mask == "causal":
        visible = tf.linalg.band_part(tf.ones_like(scores), -1, 0) > 0
        scores = tf.where(visible, scores, -np.inf)
    return edges, tf.nn.softmax(scores)


def push(y, h, mask):
    """Derivative of the head at `y` in the direction `h`."""
    edges, weights = pairs(y, mask)
    change = -2.0 * tf.reduce_sum(edges * (h[None] - h[:, None]), -1)
    change -= tf.reduce_sum(weights * change, -1, keepdims=True)
    return (weights * change) @ y + weights @ h


def pull(y, u, mask):
    """Transpose of `push`: derivative of `<u, head(y)>`."""
    with tf.GradientTape() as tape:
        tape.watch(y)
        value = tf.reduce_sum(u * (pairs(y, mask)[1] @ y))
    return tape.gradient(value, y)


@tf.function(reduce_retracing=True)
def singular_value(y, h, mask, steps):
    """Largest singular value by power iteration from `h`, its gradient in `y`, the new `h`."""
    for _ in tf.range(steps):
        u = push(y, h, mask)
        h = pull(y, u / tf.norm(u), mask)
        h /= tf.norm(h)
    with tf.GradientTape() as tape:
        tape.watch(y)
        value = tf.norm(push(y, h, mask))
    return value, tape.gradient(value, y), h


@tf.function(reduce_retracing=True)
def row_sum(y, u, norm):
    """Norm of `dy -> u . d head(y)` at the last token in the token or max norm, and its slopes.

    The last token sees every other under both masks. `J_ij^T u` has a closed form.
    """

    def size(vectors):
        if norm == "linf":
            return tf.reduce_sum(tf.abs(vectors), -1)
        return tf.sqrt(tf.reduce_sum(tf.square(vectors), -1) + 1e-300)

    with tf.GradientTape(persistent=True) as tape:
        tape.watch((y, u))
        # The max norm looks at one entry.
        unit = u / tf.norm(u) if norm == "token" else tf.one_hot(0, tf.size(u), dtype=u.dtype)
        others = y[:-1] - y[-1]
        keys = tf.exp(-tf.reduce_sum(tf.square(others), -1))
        own = 1.0 / (1.0 + tf.reduce_sum(keys))
        weights = keys * own
        mean = tf.linalg.matvec(others, weights, transpose_a=True)
        centered = tf.linalg.matvec(others - mean, unit)
        # The covariance includes the own token, which sits at -mean.
        spread = tf.linalg.matvec(others - mean, weights * centered, transpose_a=True)
        spread += own * mean * tf.reduce_sum(mean * unit)
        blocks = unit - 2.0 * centered[:, None] * others
        value = size(own * unit + 2.0 * spread) + tf.reduce_sum(weights * size(blocks))
    return (
        value,
        tape.gradient(value, y),
        tape.gradient(value, u, None, tf.UnconnectedGradients.ZERO),
    )


def two_groups(n, d, others):
    """The last token at the origin, `others` in two opposite groups at the critical distance.

    It attains the token norm for odd `n`. Tokens that are left are sent far away.
    """
    y = np.zeros((n, d))
    distance = np.sqrt(s_star(others) + 1.5)
    y[:others:2, 0], y[1:others:2, 0] = distance, -distance
    y[others:-1] = 60.0
    return y


def star(n, rng):
    """A hub of about `sqrt(n)` tokens at the origin, the others on orthogonal rays (`d = n`)."""
    hub = max(1, int(np.sqrt(n)))
    y = np.sqrt(0.5 * np.log(n)) * np.eye(n)
    y[:, 0] += np.sqrt(0.5)
    y[:hub] = 0.01 * rng.normal(size=(hub, n))
    return y


def cloud(n, d, rng):
    """Independent tokens at a random scale."""
    scale = rng.uniform(0.4, 1.6)
    return rng.normal(size=(n, d)) * scale * np.sqrt((np.log(n) + 0.5) / d)


def starts(n, d, restarts, rng):
    """Inputs to begin from, witnesses first."""
    yield two_groups(n, d, n - 1 - (n % 2 == 0))
    # For even `n` the groups are of different size, and the ascent moves the center.
    yield two_groups(n, d, n - 1) + 0.05 * rng.normal(size=(n, d))
    for _ in range(restarts):
        yield cloud(n, d, rng)


def largest_singular_value(n, mask, restarts, steps, rng):
    """Best 2-norm found."""
    best = 1.0
    inputs = list(starts(n, SETTINGS["l2"][2], restarts, rng))
    if n <= LARGEST_STAR:
        inputs.append(star(n, rng))
    for y0 in inputs:
        shape = y0.shape
        direction = [rng.normal(size=shape)]

        def loss(flat, shape=shape, direction=direction):
            y = tf.constant(flat.reshape(shape))
            value, slope, h = singular_value(y, tf.constant(direction[0]), mask, tf.constant(12))
            direction[0] = h.numpy()
            return -float(value), -slope.numpy().ravel()

        loss(y0.ravel())
        found = minimize(loss, y0.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps})
        # A power iteration never exceeds the norm: what it says is a lower bound.
        for flat in (y0.ravel(), found.x):
            y, h = tf.constant(flat.reshape(shape)), tf.constant(direction[0])
            best = max(best, float(singular_value(y, h, mask, tf.constant(100))[0]))
    return best


def largest_row_sum(n, d, norm, restarts, steps, rng):
    """Best token norm or max norm found."""
    best = 1.0
    for y0 in starts(n, d, restarts, rng):
        start = np.concatenate([y0.ravel(), np.eye(d)[0] + 0.1 * rng.normal(size=d)])

        def loss(flat):
            value, slope, turn = row_sum(
                tf.constant(flat[: n * d].reshape(n, d)), tf.constant(flat[n * d :]), norm
            )
            return -float(value), -np.concatenate([slope.numpy().ravel(), turn.numpy()])

        start[n * d :] = np.eye(d)[0]
        best = max(best, -loss(start)[0])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": steps})
        best = max(best, -loss(found.x)[0])
    return best


def bounds(norm, d, n, mask):
    """The published and the certified bound.

    For the token norm nothing is published; what Kim et al. prove of the others gives this much.
    """
    identity = np.eye(d)[None]
    certified = certified_layer_bound(identity, identity, norm=norm, tokens=n, mask=mask).value
    if norm == "token":
        return 4.0 * phi_inv(n - 1) + 1.0, certified
    query = d**0.25 * identity
    return published_layer_bound(query, identity, identity, norm=norm, tokens=n), certified


def compute(full):
    """Bounds and lower bounds, for N up to 64 (1024 in the full setting)."""
    rng = np.random.default_rng(0)
    rows = []
    for n in FULL if full else SMALL:
        # A row that counts is the last one, which sees everything under either mask.
        restarts = (12 if full else 3) if n <= 64 else 1
        sums = {
            key: largest_row_sum(n, d, norm, restarts, 200, rng)
            for key, (_, norm, d) in SETTINGS.items()
            if norm != "l2"
        }
        restarts = (24 if full else 6) if n <= 12 else 4 if n <= 64 else 0
        steps = 60 if n <= 64 else 20 if n <= 256 else 6
        for mask in MASKS:
            found = {"l2": largest_singular_value(n, mask, restarts, steps, rng), **sums}
            for key, (_, norm, d) in SETTINGS.items():
                published, certified = bounds(norm, d, n, mask)
                rows.append(
                    {
                        "setting": key,
                        "mask": mask,
                        "tokens": n,
                        "published": published,
                        "certified": certified,
                        "found": found[key],
                    }
                )
    return {"rows": rows}


def select(results, setting, mask):
    """The rows of one setting, by number of tokens."""
    return [row for row in results["rows"] if (row["setting"], row["mask"]) == (setting, mask)]


def draw(results, folder):
    """The plots and the table."""
    shown = ("l2", "token", "linf 4")
    fig, axes = report.figure(len(shown))
    for axis, setting in zip(axes, shown, strict=True):
        # Only the 2-norm depends on the mask.
        for mask, line in (
            {"full": "-", "causal": "--"}.items() if setting == "l2" else [("full", "-")]
        ):
            rows = select(results, setting, mask)
            n = [row["tokens"] for row in rows]
            name = mask if setting == "l2" else "any mask"
            if mask == "full":
                axis.loglog(n, [row["published"] for row in rows], color="0.5", label="published")
            certified = [row["certified"] for row in rows]
            axis.loglog(
                n, certified, line, color="tab:blue", linewidth=2.5, label=f"certified, {name}"
            )
            found = [row["found"] for row in rows]
            axis.loglog(
                n, found, line, color="tab:green", linewidth=1, marker=".", label=f"found, {name}"
            )
        axis.set(title=SETTINGS[setting][0], xlabel="tokens N")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("Lipschitz constant of one head")
    report.save(fig, folder, "tightness")
    columns = [
        ("l2", "full"),
        ("l2", "causal"),
        ("token", "full"),
        ("linf", "full"),
        ("linf 4", "full"),
    ]
    cells = [
        [
            f"{row['published']:.3f} / {row['certified']:.3f} / {row['found']:.3f} "
            f"({row['published'] / row['found']:.3g}x, {row['certified'] / row['found']:.3f}x)"
            for row in select(results, *column)
        ]
        for column in columns
    ]
    tokens = [str(row["tokens"]) for row in select(results, *columns[0])]
    header = [
        f"{SETTINGS[setting][0]}{f', {mask}' if setting == 'l2' else ''}"
        for setting, mask in columns
    ]
    rows = [list(row) for row in zip(tokens, *cells, strict=True)]
    report.table("tightness", folder, ["N", *header], rows)


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("tightness", options, compute, draw)


if __name__ == "__main__":
    main()
