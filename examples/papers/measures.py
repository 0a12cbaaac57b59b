"""Attention as a map on measures: how far it expands Wasserstein distances.

A sequence of tokens with weights is a measure `sum_i w_i delta(x_i)`, and attention moves each
token to an average of all: a map on measures.

1. Splitting tokens in parts at the same place leaves the measure alone, and the layer's output.
2. Wasserstein-1 on a ball: the largest expansion found for dot-product attention and for L2
   attention, by L-BFGS over places, weights and the direction in which a token is moved, against
   the constants of Theorem 7.5 of docs/theory.md, for growing radius.
3. Wasserstein-2 without a ball: L2 attention on n tokens of equal weight against its certified
   2-norm constant, which is a constant for this distance too, and dot-product attention.

Distances are computed exactly, by linear programming (`scipy.optimize`).

    python examples/papers/measures.py

Reference:
    Vuckovic, Baratin, Tachet des Combes, "On the regularity of attention", 2021.
"""

# Keras's tensors are TensorFlow's here, which pyright cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false

import math

import numpy as np
import report
import tensorflow as tf
from scipy.optimize import linear_sum_assignment, linprog, minimize

from keras_lipattn import L2MultiHeadAttention
from keras_lipattn.bounds import s_star
from keras_lipattn.bounds.column_sums import log_measure_mass

FEATURES = 2
RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SCALES = (0.3, 1.0, 3.0, 10.0, 30.0)
KINDS = {"dot-product": "tab:red", "L2": "tab:blue"}
# The move of a token, relative to the radius, by which an expansion is measured.
MOVE = 1e-4


def unit_head(features):
    """The layer as the single head `softmax_j(-|x_i - x_j|^2) x_j`."""
    layer = L2MultiHeadAttention(1, features, use_bias=False, dtype="float64")
    layer.build((None, None, features))
    layer.query_kernel.assign(features**0.25 * np.eye(features)[:, None])
    layer.value_kernel.assign(np.eye(features)[:, None])
    layer.output_kernel.assign(np.eye(features)[None])
    return layer


L2 = unit_head(FEATURES)


def attend(kind, x, weights):
    """Where the tokens `(n, d)` of a measure go, as a tensor."""
    if kind == "L2":
        return L2(x[None], token_weights=weights[None])[0]
    scores = tf.matmul(x, x, transpose_b=True) + tf.math.log(weights)
    return tf.nn.softmax(scores) @ x


def wasserstein(x, y, weights, other, power):
    """Wasserstein distance of order `power` of two measures, exactly."""
    cost = np.linalg.norm(x[:, None] - y[None], axis=-1) ** power
    n, m = cost.shape
    if n == m and np.ptp(weights) == np.ptp(other) == 0.0:
        total = cost[linear_sum_assignment(cost)].mean()
    else:
        rows = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
        masses = np.concatenate([weights / weights.sum(), other / other.sum()])
        # Distances are far below 1: the solver's tolerance is absolute.
        unit = cost.max()
        tight = {f"{side}_feasibility_tolerance": 1e-10 for side in ("primal", "dual")}
        conditions = np.concatenate(rows)
        plan = linprog(cost.ravel() / unit, A_eq=conditions, b_eq=masses, options=tight)
        total = unit * plan.fun
    return float(total ** (1.0 / power))


def constant_on_ball(kind, radius):
    """Theorem 7.5, for one head with identity matrices."""
    if kind == "L2":
        slope, own = 4.0 * radius, 2.0 * radius**2
    else:
        slope, own = radius, radius**2
    # The product of two tokens is `own` at most, as Theorem 4.3 has it.
    return own + math.exp(log_measure_mass(own, np)) * (1.0 + 2.0 * radius * slope)


def unpack(flat, n, radius):
    """Places in the ball, weights and a unit direction, from numbers without limits."""
    places = tf.reshape(flat[: n * FEATURES], (n, FEATURES))
    places *= radius / tf.sqrt(1.0 + tf.reduce_sum(tf.square(places), -1, keepdims=True))
    weights = tf.nn.softmax(flat[n * FEATURES : n * FEATURES + n])
    direction = flat[n * FEATURES + n :]
    return places, weights, direction / tf.norm(direction)


@tf.function(reduce_retracing=True)
def expansion(kind, flat, n, radius):
    """How far all tokens move when the first one does, in the mean, and the slope of it."""
    with tf.GradientTape() as tape:
        tape.watch(flat)
        x, weights, direction = unpack(flat, n, radius)
        move = tf.one_hot([0] * FEATURES, n, axis=0, dtype=x.dtype) * direction * MOVE * radius
        change = attend(kind, x + move, weights) - attend(kind, x - move, weights)
        moved = tf.sqrt(tf.reduce_sum(tf.square(change), -1) + 1e-30)
        value = tf.reduce_sum(weights * moved) / (2.0 * MOVE * radius * weights[0])
    return value, tape.gradient(value, flat)


def largest_expansion(kind, radius, n, restarts, rng):
    """Best expansion of Wasserstein-1 found on the ball, with exact distances."""
    best = 0.0
    for _ in range(restarts):
        start = rng.normal(size=n * FEATURES + n + FEATURES)

        def loss(flat):
            # Very unequal weights would leave nothing of the digits.
            spread = flat[n * FEATURES : -FEATURES]
            value, slope = expansion(kind, tf.constant(flat), n, radius)
            slope = -slope.numpy() / float(value)
            slope[n * FEATURES : -FEATURES] += 2e-3 * spread
            return -math.log(float(value)) + 1e-3 * float(spread @ spread), slope

        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 150})
        x, weights, direction = (t.numpy() for t in unpack(tf.constant(found.x), n, radius))
        other = x.copy()
        other[0] -= np.sign(x[0] @ direction) * direction * MOVE * radius
        images = [
            attend(kind, tf.constant(each), tf.constant(weights)).numpy() for each in (x, other)
        ]
        ratio = wasserstein(*images, weights, weights, 1) / wasserstein(
            x, other, weights, weights, 1
        )
        best = max(best, ratio)
    return best


def splitting(rng):
    """What splitting every token in three parts changes, relative to the size of the output."""
    x, weights = rng.normal(size=(8, FEATURES)), rng.uniform(0.1, 1.0, size=8)
    shares = rng.dirichlet(np.ones(3), size=8)
    split = (weights[:, None] * shares).ravel()
    changes = {}
    for kind in KINDS:
        whole = attend(kind, tf.constant(x), tf.constant(weights)).numpy()
        parts = attend(kind, tf.constant(np.repeat(x, 3, axis=0)), tf.constant(split)).numpy()
        changes[kind] = float(
            np.abs(parts - np.repeat(whole, 3, axis=0)).max() / np.abs(whole).max()
        )
    return changes


def at_the_critical_input(n):
    """Expansion of Wasserstein-2 by L2 attention where one token moves between two groups."""
    x = np.zeros((n, FEATURES))
    half = (n - 1) // 2
    x[:half, 0] = math.sqrt(s_star(2 * half) + 1.5)
    x[half : 2 * half, 0] = -x[0, 0]
    # What is left, one for even n, stands apart.
    x[2 * half + 1 :, 1] = 20.0
    y = x.copy()
    y[2 * half, 0] += 1e-4
    equal = np.ones(n)
    images = [attend("L2", tf.constant(each), tf.constant(equal)).numpy() for each in (x, y)]
    return wasserstein(*images, equal, equal, 2) / wasserstein(x, y, equal, equal, 2)


def without_a_ball(n, pairs, rng):
    """Largest expansion of Wasserstein-2 between random measures of n equal tokens, by scale."""
    equal = np.ones(n)
    rows = []
    for scale in SCALES:
        row = {"scale": scale}
        for kind in KINDS:
            best = 0.0
            for _ in range(pairs):
                # Tokens in a few groups: where most of the change comes from few of them.
                centers = scale * rng.normal(size=(4, FEATURES))
                x = centers[rng.integers(4, size=n)] + 0.3 * rng.normal(size=(n, FEATURES))
                y = x.copy()
                moved = rng.integers(1, n + 1)
                y[:moved] += 10.0 ** rng.uniform(-3, 0) * rng.normal(size=(moved, FEATURES))
                images = [
                    attend(kind, tf.constant(each), tf.constant(equal)).numpy() for each in (x, y)
                ]
                ratio = wasserstein(*images, equal, equal, 2) / wasserstein(x, y, equal, equal, 2)
                best = max(best, ratio)
            row[kind] = best
        rows.append(row)
    return {
        "tokens": n,
        "certified": L2.lipschitz(n).value,
        "critical": at_the_critical_input(n),
        "rows": rows,
    }


def compute(full):
    """Few restarts (many in the full setting)."""
    rng = np.random.default_rng(0)
    n, restarts, pairs = (8, 8, 150) if full else (6, 2, 20)
    balls = [
        {
            "kind": kind,
            "radius": radius,
            "constant": constant_on_ball(kind, radius),
            "found": largest_expansion(kind, radius, n, restarts, rng),
        }
        for kind in KINDS
        for radius in RADII
    ]
    return {
        "splitting": splitting(rng),
        "tokens": n,
        "balls": balls,
        "without_a_ball": without_a_ball(16, pairs, rng),
    }


def draw(results, folder):
    """The plots and the tables."""
    fig, (left, right) = report.figure(2)
    for kind, color in KINDS.items():
        rows = [row for row in results["balls"] if row["kind"] == kind]
        radii = [row["radius"] for row in rows]
        constants = [row["constant"] for row in rows]
        left.semilogy(radii, constants, "--", color=color, label=f"{kind}, Theorem 7.5")
        found = [row["found"] for row in rows]
        left.semilogy(radii, found, "o-", color=color, label=f"{kind}, found")
    left.set(xlabel="radius of the ball", ylabel="expansion of Wasserstein-1", ylim=(0.5, 1e9))
    left.set_title(f"{results['tokens']} weighted tokens in a ball")
    left.legend(frameon=False, fontsize=8)
    free = results["without_a_ball"]
    scales = [row["scale"] for row in free["rows"]]
    for kind, color in KINDS.items():
        right.loglog(
            scales, [row[kind] for row in free["rows"]], "o-", color=color, label=f"{kind}, found"
        )
    right.axhline(
        free["critical"], color="tab:blue", linestyle=":", label="L2, found at its critical input"
    )
    right.axhline(free["certified"], color="tab:blue", linestyle="--", label="L2, certified")
    right.set(xlabel="size of the tokens", ylabel="expansion of Wasserstein-2")
    right.set_title(f"{free['tokens']} equal tokens anywhere")
    right.legend(frameon=False, fontsize=8)
    report.save(fig, folder, "measures")
    report.table(
        "measures",
        folder,
        ["radius", *(f"{kind}, {what}" for kind in KINDS for what in ("found", "Theorem 7.5"))],
        [
            [
                f"{radius:g}",
                *(
                    f"{row[key]:.4g}"
                    for kind in KINDS
                    for row in results["balls"]
                    if (row["kind"], row["radius"]) == (kind, radius)
                    for key in ("found", "constant")
                ),
            ]
            for radius in RADII
        ],
    )
    report.table(
        "measures_free",
        folder,
        [
            "size of the tokens",
            *(f"{kind}, found" for kind in KINDS),
            "L2 at its critical input",
            "L2, certified",
        ],
        [
            [
                f"{row['scale']:g}",
                *(f"{row[kind]:.4g}" for kind in KINDS),
                f"{free['critical']:.4g}",
                f"{free['certified']:.4g}",
            ]
            for row in free["rows"]
        ],
    )
    report.table(
        "measures_split",
        folder,
        ["attention", "relative change when every token is split in three"],
        [[kind, f"{change:.1e}"] for kind, change in results["splitting"].items()],
    )


def main(argv=None):
    options = report.arguments(__doc__, argv)
    report.produce("measures", options, compute, draw)


if __name__ == "__main__":
    main()
